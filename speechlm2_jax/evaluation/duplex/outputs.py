"""Files of a duplex evaluation: the agent's speech, and folders in the layout of a benchmark."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from speechlm2_jax.evaluation.duplex.benchmark_folder import OUTPUT, write_benchmark
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.scoring import FIRST_TOKEN_FRAME, DuplexResponse
from speechlm2_jax.models.duplex import DuplexS2SModel


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """Where each conversation is written, by input index; empty if it is not."""

    speech: dict[int, Path] = field(default_factory=dict)
    benchmark: dict[int, Path] = field(default_factory=dict)
    """Folders."""
    roles: tuple[str, ...] = ()
    """Speakers that are the user."""

    @classmethod
    def of(
        cls,
        dialogues: Sequence[Dialogue],
        audio_folder: Path | None,
        benchmark_folder: str | None,
        roles: tuple[str, ...],
    ) -> "OutputFiles":
        """Names the files of conversations, safe and unique; a folder of None writes nothing."""
        benchmark = None if benchmark_folder is None else Path(benchmark_folder)
        return cls(
            speech={} if audio_folder is None else _speech_files(dialogues, audio_folder),
            benchmark={} if benchmark is None else _benchmark_folders(dialogues, benchmark),
            roles=roles,
        )

    def nothing(self) -> "OutputFiles":
        """The same of a process that writes nothing."""
        return OutputFiles(roles=self.roles)

    def are_lost(self, index: int) -> bool:
        """Whether a conversation was written, and a file of it is missing."""
        folder = self.benchmark.get(index)
        paths = [self.speech.get(index), None if folder is None else folder / OUTPUT]
        return not all(path.is_file() for path in paths if path is not None)

    def write(
        self, index: int, dialogue: Dialogue, response: DuplexResponse, model: DuplexS2SModel
    ) -> None:
        """Writes one conversation."""
        _write(self.speech.get(index), response.audio, model.target_sampling_rate)
        if index in self.benchmark:
            write_benchmark(
                self.benchmark[index],
                dialogue,
                response.example.source_audio,
                response.audio,
                rates_hz=(model.sampling_rate, model.target_sampling_rate),
                delay_s=FIRST_TOKEN_FRAME * model.token_equivalent_duration,
                roles=self.roles,
            )


def _speech_files(dialogues: Sequence[Dialogue], folder: Path) -> dict[int, Path]:
    """A WAV file per conversation in a folder per set."""
    files: dict[int, Path] = {}
    taken: set[Path] = set()
    for index, dialogue in enumerate(dialogues):
        path = folder / _name(dialogue.set_name) / f"{_name(dialogue.id)}.wav"
        files[index] = path.with_stem(f"{path.stem}_{index}") if path in taken else path
        taken.add(files[index])
    return files


def _benchmark_folders(dialogues: Sequence[Dialogue], folder: Path) -> dict[int, Path]:
    """A folder per set, in it one per conversation: 1, 2, ..."""
    numbers: Counter[str] = Counter()
    found = {}
    for index, dialogue in enumerate(dialogues):
        numbers[dialogue.set_name] += 1
        found[index] = folder / _name(dialogue.set_name) / str(numbers[dialogue.set_name])
    return found


def _name(text: str) -> str:
    """A file name that every file system accepts."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    return kept[:120] or "_"


def _write(file: Path | None, audio: Float[np.ndarray, " A"], rate_hz: int) -> None:
    """Writes [A] samples as 16-bit WAV, if there is a file to write."""
    import soundfile

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(str(file), np.clip(audio, -1, 1), rate_hz, subtype="PCM_16")
