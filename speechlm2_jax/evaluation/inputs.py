"""What to answer: manifests, Lhotse cuts, SHAR, or plain audio files, all as utterances."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError, read_audio
from speechlm2_jax.settings import SettingsError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording to answer; its samples are read when their turn comes."""

    id: str
    duration_s: float
    """As declared, 0 where nothing declares it; only for order and speed."""
    text: str | None
    """The reference, or None where there is nothing to score."""
    read: Callable[[int], np.ndarray]
    """Rate in Hz -> float32 samples [S]; raises AudioError for a recording that cannot be used."""


def read_inputs(inputs: str) -> list[Utterance]:
    """Lists the utterances that `inputs` means, in its own order.

    A folder with SHAR shards is SHAR, another folder its audio files by name; a `.json`, `.jsonl`
    or `.jsonl.gz` file is a NeMo manifest or Lhotse cuts, whichever its first line is. Raises
    SettingsError if there is nothing there or a line cannot be read.
    """
    path = Path(inputs).expanduser()
    if path.is_dir():
        if any(path.glob("cuts.*")):
            return _lhotse(path)
        utterances = [_audio_file(p, path) for p in sorted(path.rglob("*")) if _is_audio(p)]
    elif not path.is_file():
        raise SettingsError(f"inputs: no such file or folder: {inputs!r}")
    elif _is_audio(path):
        utterances = [_audio_file(path, path.parent)]
    else:
        utterances = _manifest_or_cuts(path)
    if not utterances:
        raise SettingsError(f"inputs: nothing to answer in {inputs!r}")
    return utterances


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()


def _audio_file(path: Path, root: Path) -> Utterance:
    def read(rate_hz: int) -> np.ndarray:
        return read_audio(path, sample_rate_hz=rate_hz)

    return Utterance(
        id=str(path.relative_to(root)), duration_s=_header_duration_s(path), text=None, read=read
    )


def _header_duration_s(path: Path) -> float:
    """Seconds by the file's header; 0 for a file without a good one, which reading will report."""
    import soundfile

    try:
        return float(soundfile.info(str(path)).duration)
    except soundfile.SoundFileError:
        return 0.0


def _manifest_or_cuts(path: Path) -> list[Utterance]:
    rows = _json_lines(path)
    first = next(rows, None)
    if first is None:
        raise SettingsError(f"inputs: {path} is empty")
    if "audio_filepath" not in first[1] and "type" in first[1]:
        return _lhotse(path)
    utterances = (_manifest_row(path, n, row) for n, row in (first, *rows))
    return [u for u in utterances if u is not None]


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line with its number from 1. Raises SettingsError for one that is no JSON object."""
    is_gzip = path.suffix == ".gz"
    with gzip.open(path, "rt") if is_gzip else path.open() as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                yield number, row
        except (ValueError, OSError, EOFError) as error:
            raise SettingsError(
                f"inputs: {path} is neither a manifest nor Lhotse cuts, nor audio: {error}"
            ) from error


def _manifest_row(manifest: Path, number: int, row: dict[str, Any]) -> Utterance | None:
    """One line of a NeMo manifest; None if it is marked to be skipped."""
    if row.get("_skipme"):
        return None
    audio = row.get("audio_filepath")
    if not isinstance(audio, str):
        raise SettingsError(f"inputs: {manifest} line {number} has no audio_filepath")
    try:
        duration_s = None if row.get("duration") is None else float(row["duration"])
        offset_s = None if row.get("offset") is None else float(row["offset"])
    except (TypeError, ValueError) as error:
        raise SettingsError(f"inputs: {manifest} line {number}: {error}") from error
    path = Path(audio).expanduser()
    if not path.is_absolute() and not path.is_file():
        path = manifest.parent / path
    text = row.get("text")

    def read(rate_hz: int) -> np.ndarray:
        return read_audio(
            path, sample_rate_hz=rate_hz, offset_s=offset_s or 0.0, duration_s=duration_s
        )

    return Utterance(
        id=_manifest_id(row, path, offset_s, duration_s),
        duration_s=_header_duration_s(path) if duration_s is None else duration_s,
        text=None if text is None else str(text),
        read=read,
    )


def _manifest_id(
    row: dict[str, Any], path: Path, offset_s: float | None, duration_s: float | None
) -> str:
    """The row's own id, else NeMo's: the file's stem, with centiseconds for a stretch of it."""
    if row.get("id") is not None:
        return str(row["id"])
    if offset_s is None or duration_s is None:
        return path.stem
    return f"{path.stem}-{round(offset_s * 100):06d}-{round(duration_s * 100):06d}"


def _lhotse(path: Path) -> list[Utterance]:
    from speechlm2_jax.data.readers import read_cuts

    try:
        return [_cut(cut) for cut in read_cuts(path)]
    except (ValueError, OSError, KeyError) as error:
        raise SettingsError(f"inputs: {path} cannot be read as Lhotse cuts: {error}") from error


def _cut(cut: Any) -> Utterance:
    texts = [s.text for s in cut.supervisions if s.text is not None]

    def read(rate_hz: int) -> np.ndarray:
        from speechlm2_jax.data.readers import read_cut_audio

        return read_cut_audio(cut, sample_rate_hz=rate_hz)

    return Utterance(
        id=str(cut.id),
        duration_s=float(cut.duration),
        text=" ".join(texts) if texts else None,
        read=read,
    )


__all__ = ["AUDIO_SUFFIXES", "AudioError", "Utterance", "read_inputs"]
