"""Where transcripts are written, which of them exist, and how they are written: whole or not."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.transcript_files import write_transcript
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
    _ambiguous: set[Path] = field(default_factory=set)

    def prepare(self, sources: Sequence[GivenRecording]) -> list[GivenRecording]:
        """The recordings whose transcripts are not all there yet.

        Two recordings whose outputs would have the same name (a.wav, a.mp3) keep their suffixes.
        """
        counts = Counter(self._stem(source) for source in sources)
        self._ambiguous = {stem for stem, count in counts.items() if count > 1}
        if self.overwrite:
            if LINES in self.formats:
                self.lines_file.unlink(missing_ok=True)
            return list(sources)
        written = _named_in(self.lines_file) if LINES in self.formats else set()
        return [
            source
            for source in sources
            if not all(path.is_file() for path in self.paths(source))
            or (LINES in self.formats and key(source) not in written)
        ]

    @property
    def lines_file(self) -> Path:
        """The file of the format jsonl."""
        return (self.folder or Path()) / LINES_FILE

    def paths(self, source: GivenRecording) -> list[Path]:
        """The files of one recording, in the order of the formats; jsonl has none of its own."""
        stem = self._stem(source)
        if stem in self._ambiguous:
            stem = stem.with_name(stem.name + source.beside.suffix)
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
                with self.lines_file.open("a", encoding="utf-8") as file:
                    file.write(write_transcript(transcript, LINES, key(source)))
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


def key(source: GivenRecording) -> str:
    """What names a recording in jsonl: its path, and its offset if it is a stretch of a file."""
    return source.name if source.beside.name == Path(source.name).name else str(source.beside)


def _named_in(file: Path) -> set[str]:
    """The recordings in a file of lines; a last line that was not written whole is cut off."""
    if not file.is_file():
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    try:
        return set(_names(whole.decode().splitlines()))
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{file}: is not a file of transcripts ({error}); --overwrite replaces it"
        ) from error


def _names(lines: Iterable[str]) -> Iterable[str]:
    return (json.loads(line)["audio_filepath"] for line in lines)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
