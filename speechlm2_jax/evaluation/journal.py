"""Writes each response as soon as it is generated, so that an interrupted evaluation can resume.

While an evaluation runs, its output manifest is a journal: a header
`{"evaluation": {"settings": ..., "inputs": N}}`, then rows in the order in which they were
generated. Each row has a `progress` field with its key and what resuming needs. At the end the file
is replaced by the rows in input order.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from speechlm2_jax.data.output_folders import lock_file
from speechlm2_jax.evaluation.results import write_rows
from speechlm2_jax.settings import SettingsError, parse_json

if TYPE_CHECKING:
    from speechlm2_jax.evaluation.split import ProcessPart

HEADER, PROGRESS, SESSION = "evaluation", "progress", "session"
PART = ".part-"
FINISHED_BEFORE, OF_OTHER_SETTINGS = ".previous", ".unfinished"
"""Suffixes of files that are renamed to make room for a new evaluation."""


def row_keys(facts: Iterable[Sequence[object]]) -> list[str]:
    """A key for each input: a hash of its facts, and a counter where facts repeat."""
    seen: Counter[str] = Counter()
    keys = []
    for one in facts:
        digest = hashlib.sha256(json.dumps(one, default=str).encode()).hexdigest()[:24]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


@dataclass(frozen=True)
class Kept:
    """A row of an earlier, interrupted evaluation."""

    row: Mapping[str, object]
    progress: Mapping[str, Any]


class Journal:
    """The output manifest of a running evaluation.

    Args:
        path: the output manifest.
        settings: plain values that responses depend on; rows of other settings are not resumed.
        keys: keys of the inputs, in order (`row_keys`).

    Raises SettingsError if the file cannot be read, or another process is writing it.
    """

    part: "ProcessPart | None" = None
    """What this process does, if an evaluation is split over several."""

    def __init__(self, path: Path, settings: Mapping[str, object], keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys
        self.kept: dict[int, Kept] = {}
        """Rows of the interrupted evaluation by input index, oldest first."""
        self.note: str | None = None
        """A line for the user about the file that was there."""
        self._settings = json.loads(json.dumps(settings, default=str))
        self._file: IO[bytes] | None = None
        self._done: set[int] = set()
        self._superseded: Path | None = path.with_name(path.name + FINISHED_BEFORE)
        with self._errors_name_file():
            self._resume()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is not None and self._done:
            error.add_note(self.summary())

    def summary(self) -> str:
        """One line: how many inputs are done, and how to resume."""
        return (
            f"{len(self._done)} of {len(self.keys)} responses are in {self.path}; run the same "
            "command again to resume"
        )

    def append(self, rows: Mapping[int, tuple[Mapping[str, object], Mapping[str, object]]]) -> None:
        """Writes rows by input index, each with its progress (what resuming needs)."""
        if not rows:
            return
        lines = [
            {**row, PROGRESS: {"key": self.keys[index], **progress}}
            for index, (row, progress) in rows.items()
        ]
        with self._errors_name_file():
            if self._file is None:
                self._create()
            self._write(lines)
        self._done |= set(rows)

    def start(self, session: str) -> None:
        """Creates the file before there is a row; `session` is part of its header."""
        with self._errors_name_file():
            if self._file is None:
                self._create({SESSION: session})

    def adopt_parts(self) -> None:
        """Takes over the rows of the files of single processes, and removes these files.

        Files with other settings are kept under another name.
        """
        for path in sorted(self.path.parent.glob(f"{self.path.name}{PART}*[0-9]")):
            with self._errors_name_file():
                header = _header(path)
                if header is None or _differences(header.get("settings") or {}, self._settings):
                    os.replace(path, path.with_name(path.name + OF_OTHER_SETTINGS))
                    continue
                new = {i: kept for i, kept in self._rows_of(path)[0].items() if i not in self.kept}
            self.append({index: (kept.row, kept.progress) for index, kept in new.items()})
            self.kept |= new
            path.unlink()
        self._count_kept()

    def read_also(self, path: Path) -> None:
        """Resumes the rows of another unfinished file of this evaluation too, unchanged."""
        with self._errors_name_file():
            header = _header(path) if path.is_file() else None
            if header is None or _differences(header.get("settings") or {}, self._settings):
                return
            self.kept = self._rows_of(path)[0] | self.kept

    def finish(self, rows: Sequence[Mapping[str, object]], record: Mapping[str, object]) -> None:
        """Replaces the journal by the rows in input order and the provenance."""
        with self._errors_name_file():
            write_rows(self.path, rows, record)
            if self._superseded is not None:
                self._superseded.unlink(missing_ok=True)
        self._done = set()
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _resume(self) -> None:
        """Reads the rows of an interrupted evaluation with the same settings."""
        if not self.path.is_file() or (header := _header(self.path)) is None:
            return
        changed = _differences(header.get("settings") or {}, self._settings)
        if changed:
            self._superseded = None  # not this evaluation's to delete
            aside = self.path.with_name(self.path.name + OF_OTHER_SETTINGS)
            self._locked(self.path).close()
            os.replace(self.path, aside)
            self.note = (
                f"{self.path} holds an unfinished evaluation with other settings ({changed}); it "
                f"is kept as {aside.name}, and the evaluation starts from the first input"
            )
            return
        self._file = self._locked(self.path)
        self.kept, size = self._rows_of(self.path)
        self._file.truncate(size)
        self._file.seek(size)
        self._done = set(self.kept)
        self._count_kept()

    def _count_kept(self) -> None:
        if self.kept:
            self.note = f"{len(self.kept)} of {len(self.keys)} responses are in {self.path} already"

    def _rows_of(self, path: Path) -> tuple[dict[int, Kept], int]:
        """Reads all whole lines of a file; also the size in bytes up to their end."""
        indices = {key: index for index, key in enumerate(self.keys)}
        rows: dict[int, Kept] = {}
        size = 0
        with path.open("rb") as file:
            for line in file:
                if (row := _parsed(line)) is None:
                    break  # cut off: this line and what follows are dropped
                size += len(line)
                progress = row.pop(PROGRESS, {})
                index = indices.get(progress.get("key"))
                if index is not None:
                    rows[index] = Kept(row, progress)
        return rows, size

    def forget(self, indices: Iterable[int]) -> None:
        """Drops rows, so that they are generated again; the newer rows count."""
        for index in indices:
            self.kept.pop(index)
            self._done.discard(index)

    def _create(self, more: Mapping[str, object] | None = None) -> None:
        """Creates the file. A finished manifest is kept as NAME.previous until `finish`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._locked(self.path).close()
            os.replace(self.path, self.path.with_name(self.path.name + FINISHED_BEFORE))
        self.path.touch()
        self._file = self._locked(self.path)
        header = {"settings": self._settings, "inputs": len(self.keys), **(more or {})}
        self._write([{HEADER: header}])

    def _write(self, lines: Sequence[Mapping[str, object]]) -> None:
        """Writes whole lines in one call, so that a signal cannot split them."""
        assert self._file is not None
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        start = self._file.tell()
        try:
            self._file.write(data.encode("utf-8", "backslashreplace"))
        except OSError:
            self._file.truncate(start)
            raise

    def _locked(self, path: Path) -> IO[bytes]:
        file = path.open("r+b", buffering=0)
        if not lock_file(file):
            file.close()
            raise SettingsError(
                f"output_manifest: another evaluation is writing {path}; name another file, or "
                "wait until it ends"
            )
        return file

    @contextlib.contextmanager
    def _errors_name_file(self) -> Any:
        """Raises an OSError as a SettingsError that names the file."""
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise SettingsError(f"output_manifest: {self.path}: {why}") from error


def part_file(path: Path, index: int) -> Path:
    """The file of one of several processes beside the output manifest."""
    return path.with_name(f"{path.name}{PART}{index}")


def session_of(path: Path) -> object:
    """What `start` was given of an unfinished file; None for any other."""
    header = _header(path) if path.is_file() else None
    return None if header is None else header.get(SESSION)


def rows_after(path: Path, size: int) -> tuple[int, int]:
    """How many whole lines a file has got after its first `size` bytes, and its size now."""
    try:
        with path.open("rb") as file:
            file.seek(size)
            new = file.read()
    except FileNotFoundError:  # another process's, which has not started it yet
        return 0, size
    end = new.rfind(b"\n") + 1
    return new.count(b"\n"), size + end


def _header(path: Path) -> dict[str, Any] | None:
    """The header of an unfinished evaluation; None for any other file."""
    with path.open("rb") as file:
        first = _parsed(file.readline())
    header = None if first is None else first.get(HEADER)
    return header if isinstance(header, dict) else None


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for a line that was cut off or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = parse_json(line)
    except SettingsError:
        return None
    return found if isinstance(found, dict) else None


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """The settings that differ, as one line."""
    found = [
        f"{key}: {before.get(key)!r}, now {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    return "; ".join(found)
