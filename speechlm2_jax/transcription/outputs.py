"""Where transcripts are written, which of them exist, and how they are written: whole or not."""

import errno
import os
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm2_jax.data.output_folders import check_writable, lock_file
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.transcript_files import to_dict, write_transcript
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription.inputs import GivenRecording
from speechlm2_jax.transcription.lines_file import LINES_FILE, LinesFile, key_of, write_whole
from speechlm2_jax.transcription.origins import Origin, origin_of
from speechlm2_jax.transcription.output_journal import AGAIN, JOURNAL, WRITTEN, Entry, OutputJournal
from speechlm2_jax.transcription.output_names import name_outputs, stem_of

LINES = "jsonl"
"""The format that has one file for all recordings."""
_OF_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE)
"""Errors of a disk or a process, after which no other output can be written either."""


class OutputError(Exception):
    """The outputs of one recording cannot be written; those of others may."""


@dataclass(kw_only=True)
class Outputs:
    """Files of some formats for some recordings."""

    formats: tuple[str, ...]
    folder: Path | None = None
    """None: beside each recording; jsonl in the working folder."""
    overwrite: bool = False
    changed: Sequence[GivenRecording] = ()
    """Recordings whose files have changed since they were transcribed; `prepare` finds them."""
    _stems: Mapping[Hashable, Path] = field(default_factory=dict)
    _missing: Mapping[Hashable, tuple[str, ...]] = field(default_factory=dict)
    _left: Sequence[GivenRecording] = ()
    _origins: Mapping[Hashable, Origin] = field(default_factory=dict)
    _journal: OutputJournal = field(default_factory=OutputJournal)

    def __post_init__(self) -> None:
        """Names the file of jsonl."""
        self._lines = LinesFile((self.folder or Path()) / LINES_FILE)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keeps other commands from writing into the folder, or into the same file of jsonl.

        Raises SettingsError if another command is writing there.
        """
        if self.folder is None and LINES not in self.formats:
            yield  # each file is written whole: two commands do no harm
            return
        folder = self._lines.path.parent
        with ExitStack() as stack:
            with suppress(OSError):  # `prepare` tells of a folder that cannot be written
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / JOURNAL).open("ab"))
                if not lock_file(file):
                    raise SettingsError(
                        f"{folder}: another command is writing transcripts there; wait until it "
                        "ends, or name another folder with --output-dir"
                    )
            yield

    def prepare(self, sources: Sequence[GivenRecording]) -> list[GivenRecording]:
        """The recordings whose transcripts are not all there yet; with `overwrite`, all.

        Raises SettingsError for recordings whose outputs `name_outputs` cannot tell apart, for a
        file in their place that the command did not write, or wrote of another recording, and for
        a folder that cannot be written.
        """
        self._stems = name_outputs(sources, self.folder)
        self._origins = {source.key: origin_of(source) for source in sources}
        self._check_own(sources)
        self.changed = [
            source
            for source in sources
            if any(self._is_changed(source, form) for form in self.formats)
        ]
        self._missing = {source.key: tuple(self._missing_formats(source)) for source in sources}
        self._left = [source for source in sources if self._missing[source.key]]
        for folder in {path.parent for source in self._left for path in self._paths(source)}:
            check_writable(folder, "--output-dir")
        return list(self._left)

    def begin(self) -> None:
        """To be called before the first `write`: what is replaced now does not count as done."""
        if self.overwrite:
            present = {
                self._state_entry(source, form): self._origin(source)
                for source in self._left
                for form in self.formats
                if self._is_present(source, form)
            }
            with self._told():
                self._journal.note(present, AGAIN)

    def write(self, source: GivenRecording, transcript: Transcript) -> None:
        """Writes what is missing of one recording.

        Raises OutputError if a file of this recording cannot be written, SettingsError for the file
        of all recordings, and for a disk that is full.
        """
        with self._told():
            for form in self._missing.get(source.key, self.formats):
                entry, origin = self._state_entry(source, form), self._origin(source)
                if form == LINES:
                    self._journal.note({_entry(self._lines.path): None}, WRITTEN)
                    self._lines.add(self._named(source) | to_dict(transcript))
                    self._journal.note({entry: origin}, WRITTEN)
                else:
                    with self._told_of_one():
                        self._journal.note({entry: origin}, AGAIN)
                        text = write_transcript(transcript, form, source.name, source.offset_s)
                        write_whole(self._path(source, form), text.encode())
                        self._journal.note({entry: origin}, WRITTEN)

    def close(self) -> None:
        """Removes rows of jsonl that were replaced. Raises SettingsError."""
        with self._told():
            self._lines.close()

    def _check_own(self, sources: Sequence[GivenRecording]) -> None:
        """Raises SettingsError for a file that is not the transcript of its recording."""
        for source in sources:
            for path in self._paths(source):
                entry = _entry(path)
                if not os.path.exists(path):
                    continue
                if self._journal.state(entry) is None:
                    raise SettingsError(
                        f"{path} is there already, and this command did not write it; name a "
                        "folder for the transcripts with --output-dir"
                    )
                before, now = self._journal.origin(entry), self._origin(source)
                if before is not None and before.is_other(now) and not self.overwrite:
                    raise SettingsError(
                        f"{path} is the transcript of {before.place}, not of {now.place}; name "
                        "another folder with --output-dir, or replace it with --overwrite"
                    )

    def place(self) -> str:
        """Where the outputs of the recordings lie that `prepare` gave: a file or a folder."""
        paths = dict.fromkeys(path for source in self._left for path in self._paths(source))
        folders = {path.parent for path in paths}
        if len(paths) == 1:
            return str(*paths)
        if self.folder is None and len(folders) > 1:
            lines = f", {self._lines.path}" if LINES in self.formats else ""
            return f"the folders of the recordings{lines}"
        return f"{self.folder or next(iter(folders))}/"

    def _missing_formats(self, source: GivenRecording) -> Iterator[str]:
        for form in self.formats:
            is_done = self._is_present(source, form) and not self.overwrite
            is_again = self._journal.state(self._state_entry(source, form)) == AGAIN
            if not is_done or is_again or self._is_changed(source, form):
                yield form

    def _is_changed(self, source: GivenRecording, form: str) -> bool:
        """Whether an output was made from an earlier content of its recording's file."""
        before = self._journal.origin(self._state_entry(source, form))
        return (
            before is not None
            and self._is_present(source, form)
            and before.is_changed(self._origin(source))
        )

    def _origin(self, source: GivenRecording) -> Origin:
        """The recording as it was before it was read."""
        return self._origins.get(source.key) or origin_of(source)

    def _is_present(self, source: GivenRecording, form: str) -> bool:
        if form == LINES:
            return self._row_key(source) in self._lines.written()
        return os.path.isfile(self._path(source, form))

    def _state_entry(self, source: GivenRecording, form: str) -> Entry:
        """What the journal calls an output: a file, or a row of jsonl."""
        if form == LINES:
            return self._lines.path.parent, self._row_key(source)
        return _entry(self._path(source, form))

    def _row_key(self, source: GivenRecording) -> str:
        return key_of(self._named(source), self._lines.path.parent)

    def _paths(self, source: GivenRecording) -> list[Path]:
        """The files of one recording; that of jsonl is the same for all."""
        return [
            self._lines.path if form == LINES else self._path(source, form) for form in self.formats
        ]

    def _path(self, source: GivenRecording, form: str) -> Path:
        stem = self._stems.get(source.key) or stem_of(source, self.folder)
        return stem.with_name(f"{stem.name}.{form}")

    def _named(self, source: GivenRecording) -> dict[str, Any]:
        """What names a recording in jsonl: its path from the file's folder, and its stretch."""
        name = source.name
        if not is_remote(name) and not os.path.isabs(name):
            name = Path(os.path.relpath(name, self._lines.path.parent)).as_posix()
        known = {"offset": source.offset_s, "channel": source.channel, "place": source.member}
        return {"audio_filepath": name} | {key: own for key, own in known.items() if own}

    @contextmanager
    def _told_of_one(self) -> Generator[None]:
        """Turns an error of one file into an OutputError that names it."""
        try:
            yield
        except OSError as error:
            if error.errno in _OF_ALL:
                raise
            why = f"{error.filename}: cannot be written ({error.strerror})"
            raise OutputError(why) from error

    @contextmanager
    def _told(self) -> Generator[None]:
        """Turns an error of the disk into one that names the file and the option."""
        try:
            yield
        except OSError as error:
            raise SettingsError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror}); name "
                "another folder with --output-dir"
            ) from error


def _entry(path: Path) -> Entry:
    return path.parent, path.name
