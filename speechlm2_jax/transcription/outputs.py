"""Where transcripts are written, which of them exist, and how they are written: whole or not."""

import functools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.transcript_files import to_dict, write_transcript
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription.inputs import GivenRecording

LINES = "jsonl"
"""The format that has one file for all recordings."""
LINES_FILE = "transcripts.jsonl"


@dataclass(kw_only=True)
class Outputs:
    """Files of some formats for some recordings."""

    formats: tuple[str, ...]
    folder: Path | None = None
    """None: beside each recording; jsonl in the working folder."""
    overwrite: bool = False
    _stems: dict[str, Path] = field(default_factory=dict)
    _is_begun: bool = False

    def prepare(self, sources: Sequence[GivenRecording]) -> list[GivenRecording]:
        """The recordings whose transcripts are not all there yet.

        Recordings whose outputs would have the same name (a.wav, a.mp3) keep their suffixes. If two
        of several folders still have one name in `folder`, all lie in their own folders there.
        Raises SettingsError for two recordings that nothing tells apart.
        """
        self._stems = _named_apart(sources, self._stem)
        if self.folder is not None and _clash(self._stems):
            self._stems = _named_apart(sources, _below(self.folder, sources))
        if clash := _clash(self._stems):
            raise SettingsError(
                f"{clash[0]} and {clash[1]} would have the same output, {self._stems[clash[0]]}; "
                "transcribe them with two --output-dir"
            )
        if self.overwrite:
            return list(sources)
        written = _named_in(self.lines_file) if LINES in self.formats else set()
        return [
            source
            for source in sources
            if not all(path.is_file() for path in self.paths(source))
            or (LINES in self.formats and _line_key(self._line(source)) not in written)
        ]

    @property
    def lines_file(self) -> Path:
        """The file of the format jsonl."""
        return (self.folder or Path()) / LINES_FILE

    def paths(self, source: GivenRecording) -> list[Path]:
        """The files of one recording, in the order of the formats; jsonl has none of its own."""
        stem = self._stems.get(source.utterance.source) or self._stem(source)
        return [Path(f"{stem}.{form}") for form in self.formats if form != LINES]

    def write(self, source: GivenRecording, transcript: Transcript) -> None:
        """Writes the transcript of one recording. Raises SettingsError if that is not possible."""
        own = (form for form in self.formats if form != LINES)
        try:
            for path, form in zip(self.paths(source), own, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(path, write_transcript(transcript, form, source.name))
            if LINES in self.formats:
                self.lines_file.parent.mkdir(parents=True, exist_ok=True)
                mode = "w" if self.overwrite and not self._is_begun else "a"
                row = self._line(source) | to_dict(transcript)
                with self.lines_file.open(mode, encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._is_begun = True
        except OSError as error:
            raise SettingsError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror}); name "
                "another folder with --output-dir"
            ) from error

    def _stem(self, source: GivenRecording) -> Path:
        """The path of its outputs without their suffix."""
        if self.folder is not None:
            return self.folder / source.inside.with_suffix("")
        if "://" in source.name:
            return Path(source.beside.name).with_suffix("")
        return source.beside.with_suffix("")

    def _line(self, source: GivenRecording) -> dict[str, Any]:
        """What names a recording in jsonl: its path from the file's folder, and its offset."""
        name = source.name
        if "://" not in name and not os.path.isabs(name):
            name = Path(os.path.relpath(name, self.lines_file.parent)).as_posix()
        return {"audio_filepath": name} | ({"offset": source.offset_s} if source.offset_s else {})


def _named_apart(
    sources: Sequence[GivenRecording], stem_of: Callable[[GivenRecording], Path]
) -> dict[str, Path]:
    """Source -> path of its outputs; with the recording's suffix if another has the same stem.

    The other may be given too, or lie in the same folder: its outputs are no outputs of this one.
    """
    stems = {source.utterance.source: stem_of(source) for source in sources}
    counts = Counter(stems.values())
    for source in sources:
        stem = stems[source.utterance.source]
        if counts[stem] > 1 or _has_sibling(source.beside):
            stems[source.utterance.source] = stem.with_name(stem.name + source.beside.suffix)
    return stems


def _has_sibling(recording: Path) -> bool:
    """Whether a recording with another suffix lies beside this one."""
    return len(_recordings_of(recording.parent).get(recording.stem, ())) > 1


@functools.lru_cache(maxsize=64)
def _recordings_of(folder: Path) -> Mapping[str, set[str]]:
    """Stem -> suffixes of the recordings in a folder; empty for one that is not there."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in os.listdir(folder) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in AUDIO_SUFFIXES:
            found[stem].add(suffix)
    return found


def _clash(stems: Mapping[str, Path]) -> tuple[str, str] | None:
    """Two sources with one path of outputs; None if there are none."""
    first: dict[Path, str] = {}
    for source, stem in stems.items():
        if first.setdefault(stem, source) != source:
            return first[stem], source
    return None


def _below(folder: Path, sources: Sequence[GivenRecording]) -> Callable[[GivenRecording], Path]:
    """Places the outputs in `folder` as the recordings lie in the folder that holds them all."""
    root = os.path.commonpath([source.beside.parent.absolute() for source in sources])
    return lambda source: folder / source.beside.absolute().relative_to(root).with_suffix("")


def _named_in(file: Path) -> set[tuple[str, float]]:
    """The recordings in a file of lines; a last line that was not written whole is cut off."""
    if not file.is_file():
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    try:
        return {_line_key(json.loads(line)) for line in whole.split(b"\n") if line}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{file}: is not a file of transcripts ({error}); --overwrite replaces it"
        ) from error


def _line_key(row: Mapping[str, Any]) -> tuple[str, float]:
    return row["audio_filepath"], row.get("offset", 0.0)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
