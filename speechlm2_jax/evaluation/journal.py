"""Answers are written as they end, so that an interrupted evaluation can be resumed.

While an evaluation runs, its output manifest holds a header and the rows answered so far, in the
order in which they ended: `{"evaluation": {"settings": ..., "inputs": N}}`, then rows with a
`progress` field, which holds the row's key and what else is needed to go on. When all inputs are
answered, the file is replaced by the rows in input order.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from speechlm2_jax.evaluation.results import write_rows
from speechlm2_jax.settings import SettingsError

HEADER, PROGRESS = "evaluation", "progress"
FINISHED_BEFORE, OF_OTHER_SETTINGS = ".previous", ".unfinished"
"""What is appended to the name of a file that makes room for a new evaluation's."""


def row_keys(facts: Iterable[Sequence[Any]]) -> list[str]:
    """A key for each input from what identifies it; equal ones are told apart by their order."""
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

    row: Mapping[str, Any]
    progress: Mapping[str, Any]


class Journal:
    """The output manifest of an evaluation that runs.

    Args:
        path: of the output manifest.
        settings: plain values that answers depend on; rows of other settings are not resumed.
        keys: of the inputs, in order (`row_keys`).

    Raises SettingsError if another process writes the file, or if it cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
        self.path, self.keys = path, keys
        self.kept: dict[int, Kept] = {}
        """The rows that are answered already, by their places among the inputs, oldest first."""
        self.note: str | None = None
        """What there is to say about the file that was there."""
        self._settings = json.loads(json.dumps(settings, default=str))
        self._file: IO[bytes] | None = None
        self._answered: set[int] = set()
        self._superseded: Path | None = path.with_name(path.name + FINISHED_BEFORE)
        with self._clear():
            self._resume()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()
        if error is not None and self._answered:
            error.add_note(self.summary())

    def summary(self) -> str:
        """How far the evaluation is, and how to go on."""
        return (
            f"{len(self._answered)} of {len(self.keys)} answers are in {self.path}; the same "
            "command answers the rest"
        )

    def append(self, rows: Mapping[int, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Writes rows, by the places of their inputs, each with what is needed to go on."""
        if not rows:
            return
        lines = [
            {**row, PROGRESS: {"key": self.keys[index], **progress}}
            for index, (row, progress) in rows.items()
        ]
        with self._clear():
            if self._file is None:
                self._begin()
            self._write(lines)
        self._answered |= set(rows)

    def finish(self, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
        """Replaces the file by the rows in input order and the provenance."""
        with self._clear():
            write_rows(self.path, rows, record)
            if self._superseded is not None:
                self._superseded.unlink(missing_ok=True)
        self._answered = set()
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _resume(self) -> None:
        """Takes over the rows of an interrupted evaluation with the same settings."""
        if not self.path.is_file() or (header := _header(self.path)) is None:
            return
        changed = _differences(header.get("settings") or {}, self._settings)
        if changed:
            self._superseded = None  # not this evaluation's to delete
            aside = self.path.with_name(self.path.name + OF_OTHER_SETTINGS)
            self._locked(self.path).close()
            os.replace(self.path, aside)
            self.note = (
                f"{self.path} was of an unfinished evaluation with other settings ({changed}); it "
                f"is kept as {aside.name}, and all is answered anew"
            )
            return
        self._file = self._locked(self.path)
        size = self._read_rows()
        self._file.truncate(size)
        self._file.seek(size)
        self._answered = set(self.kept)
        if self.kept:
            self.note = f"{len(self.kept)} of {len(self.keys)} answers are in {self.path} already"

    def _read_rows(self) -> int:
        """Takes the whole lines; gives the size of the file up to their end."""
        places = {key: index for index, key in enumerate(self.keys)}
        size = 0
        with self.path.open("rb") as file:
            for line in file:
                if (row := _parsed(line)) is None:
                    break  # cut off, and everything behind it
                size += len(line)
                progress = row.pop(PROGRESS, {})
                index = places.get(progress.get("key"))
                if index is not None:
                    self.kept[index] = Kept(row, progress)
        return size

    def forget(self, indices: Iterable[int]) -> None:
        """Has kept rows answered once more; their newer rows count."""
        for index in indices:
            self.kept.pop(index)
            self._answered.discard(index)

    def _begin(self) -> None:
        """Starts the file; a finished one that was there stays until the new one is finished."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._locked(self.path).close()
            os.replace(self.path, self.path.with_name(self.path.name + FINISHED_BEFORE))
        self.path.touch()
        self._file = self._locked(self.path)
        self._write([{HEADER: {"settings": self._settings, "inputs": len(self.keys)}}])

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """One write of whole lines: a signal or a kill comes before or after it."""
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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise SettingsError(
                f"output_manifest: another evaluation is writing {path}; name another file, or "
                "wait for its end"
            ) from error
        except OSError:  # a file system without locks
            pass
        return file

    @contextlib.contextmanager
    def _clear(self) -> Any:
        """Turns what a disk refuses into one line."""
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise SettingsError(f"output_manifest: {self.path}: {why}") from error


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
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, for a reader."""
    found = [
        f"{key}: {before.get(key)!r}, now {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    return "; ".join(found)
