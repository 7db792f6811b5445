"""Reads stretches of a manifest into columns: in this process, or as one that is told by its input.

    python -m speechlm2_jax.data.index.worker

A process of its own imports nothing of the program that starts it, and shares no thread with it.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import abc
import gc
import itertools
import json
import os
import pickle
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.counts import Count, Counts
from speechlm2_jax.data.index.packed_kinds import rows_of_shards
from speechlm2_jax.data.index.packed_rows import (
    PackedRow,
    PackedShard,
    member_numbers,
    shard_bytes,
)
from speechlm2_jax.data.index.pair_cursor import PairCursor
from speechlm2_jax.data.index.row_columns import (
    PAIR_TYPES,
    SEVERAL_MEMBER_TYPES,
    SHARD_TYPES,
    packed_types,
    row_columns,
)
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.index.rows import RowReader, lines_of
from speechlm2_jax.data.index.texts import PlainText, Text, lines_between, open_text
from speechlm2_jax.data.json_lines import decoded_line
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.storage.access import StorageAccess, current, using
from speechlm2_jax.data.storage.downloads import shown
from speechlm2_jax.data.text_readers import (
    QuestionDraws,
    fewer_lines,
    pair_of_lines,
    questions_of,
)
from speechlm2_jax.settings import SettingsError

_ROWS_AT_ONCE = 2048
_LINE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to read of a manifest."""

    manifest: Path
    options: ManifestOptions
    kind: RowKind
    """Of its rows."""
    points: Path | None
    """Of a compressed manifest the folder of points that reading starts from."""
    shards: tuple[PackedShard, ...] = ()
    """Of packed recordings; none: of a manifest alone."""
    with_rows: bool
    """Whether places and durations are wanted."""
    counts: Counts | None
    """How texts are counted; None: they are not."""
    storage: StorageAccess = field(default_factory=current)
    """What may be read."""


class ChunkReader(abc.ABC):
    """Reads stretches of what a job asks for.

    Raises SettingsError for counts whose settings contradict each other.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._count: Count = _nothing if job.counts is None else job.counts.counter()

    def read(self, start: int, end: int) -> dict[str, np.ndarray]:
        """The columns of the rows of a stretch, one chunk after the other.

        Raises SettingsError, naming the line, for one that cannot be read.
        """
        parts, first = list[dict[str, np.ndarray]](), 0
        for columns, rows in self._chunks(start, end):
            if "several" in columns:
                columns["several"] += np.uint64(first)
            parts.append(columns)
            first += rows
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @abc.abstractmethod
    def _chunks(self, start: int, end: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Columns of some rows at a time, and how many these are; at least one, maybe of none."""
        ...


class LinesReader(ChunkReader):
    """Reads the lines of a manifest that begin in a stretch of its bytes."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._rows = RowReader(job.manifest, job.options, job.kind)
        self._text = open_text(job.manifest, job.points)

    def _chunks(self, start: int, end: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        begin, stop = _line_start(self._text, start), _line_start(self._text, end)
        lines, first = lines_of(self._text.read(begin, stop - begin), begin), 0
        while (chunk := list(islice(lines, _ROWS_AT_ONCE))) or not first:
            yield self._columns(chunk, begin, first), len(chunk)
            first += len(chunk)
            if not chunk:
                return

    def _columns(
        self, chunk: list[tuple[int, bytes]], begin: int, first: int
    ) -> dict[str, np.ndarray]:
        try:
            return self._columns_of(chunk, first + 1)
        except SettingsError:
            # the number of the line is worth reading the file up to it
            return self._columns_of(chunk, lines_between(self._text, 0, begin) + first + 1)

    def _columns_of(self, chunk: list[tuple[int, bytes]], first: int) -> dict[str, np.ndarray]:
        """The columns of lines of which the first has a number."""
        name = self._job.manifest
        lines = [(f"{name} line {n}", line) for n, (_, line) in enumerate(chunk, start=first)]
        made = self._rows.conversations(lines, with_lengths=self._job.with_rows)
        columns = self._count(made)
        if self._job.with_rows:
            columns |= row_columns([(offset, len(line)) for offset, line in chunk], made)
        return columns


class ShardsReader(ChunkReader):
    """Reads the shards whose manifests begin in a stretch of the bytes of all."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._rows = rows_of_shards(job.shards, job.options, job.kind, job.points)
        self._begins = list(itertools.accumulate(shard_bytes(job.shards), initial=0))[:-1]

    def _chunks(self, start: int, end: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        first, after = bisect_left(self._begins, start), bisect_left(self._begins, end)
        yield self._columns(0, []), 0
        for number in range(first, after):
            rows, count = self._rows.rows(number), 0
            while chunk := list(islice(rows, _ROWS_AT_ONCE)):
                yield self._columns(number, chunk), len(chunk)
                count += len(chunk)
            yield self._columns(number, [], [count]), 0

    def _columns(
        self, number: int, chunk: Sequence[PackedRow], shard_rows: Sequence[int] = ()
    ) -> dict[str, np.ndarray]:
        """The columns of rows of a shard, and the numbers of rows of some shards."""
        kind, tars = self._job.kind, self._job.shards[number].tars
        made = [kind.finished(row.conversation) for row in chunk]
        columns = self._count(made)
        if self._job.with_rows:
            members = [member_numbers(one, tars) for one in made]
            is_one_each = kind.duplex is not None
            places = [
                (row.offset, *(of if is_one_each else of[:1] or [0]))
                for row, of in zip(chunk, members, strict=True)
            ]
            several = [] if is_one_each else [n for of in members if len(of) > 1 for n in of]
            columns |= row_columns(places, made, packed_types(len(tars)))
            columns |= {n: np.asarray(several, of) for n, of in SEVERAL_MEMBER_TYPES.items()}
            columns |= {n: np.asarray(shard_rows, of) for n, of in SHARD_TYPES.items()}
        return columns


class PairsReader(ChunkReader):
    """Reads the lines of a text that begin in a stretch of its bytes, and those of its pair."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        assert job.kind.pair is not None
        self._pair = job.kind.pair
        self._source, self._target = PlainText(job.manifest), PlainText(self._pair.target)
        self._cursor = PairCursor(self._source, self._target)
        self._questions = questions_of(self._pair.questions)
        self._draws = QuestionDraws(len(self._questions), job.options.seed)

    def _chunks(self, start: int, end: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        begin, stop = _line_start(self._source, start), _line_start(self._source, end)
        targets, line = self._cursor.lines_from(begin), self._cursor.lines
        self._draws.go_to(self._pair.first + line if self._questions else 0)
        sources = lines_of(self._source.read(begin, stop - begin), begin)
        yield self._columns([], [], line), 0
        while chunk := list(islice(sources, _ROWS_AT_ONCE)):
            others = list(islice(targets, len(chunk)))
            if len(others) < len(chunk):
                raise fewer_lines(self._target.path, self._source.path)
            yield self._columns(chunk, others, line), len(chunk)
            line += len(chunk)
        if stop == self._source.size and next(targets, None) is not None:
            raise fewer_lines(self._source.path, self._target.path)

    def _columns(
        self, sources: list[tuple[int, bytes]], targets: list[tuple[int, bytes]], line: int
    ) -> dict[str, np.ndarray]:
        """The columns of pairs behind so many lines."""
        asked = [self._draws.next() if self._questions else 0 for _ in sources]
        made: list[Conversation | None] = []
        rows = zip(sources, targets, asked, strict=True)
        for number, (one, other, question) in enumerate(rows, start=line + 1):
            where = f"{shown(self._source.path)} line {number}"
            texts = decoded_line(where, one[1]), decoded_line(where, other[1])
            text = self._questions[question] if self._questions else None
            made.append(pair_of_lines(where, *texts, text, self._job.options))
        columns = self._count(made)
        if self._job.with_rows:
            starts = [[offset for offset, _ in lines] for lines in (sources, targets)]
            columns |= row_columns(list(zip(*starts, asked, strict=True)), made, PAIR_TYPES)
        return columns


def _nothing(conversations: Sequence[object]) -> dict[str, np.ndarray]:
    return {}


def reader_of(job: Job) -> ChunkReader:
    """What reads the stretches of a job."""
    if job.kind.pair is not None:
        return PairsReader(job)
    return ShardsReader(job) if job.shards else LinesReader(job)


def save_chunk(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes the columns of a chunk; the file appears whole or not at all."""
    new = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
    try:
        with open(new, "wb") as file:
            np.savez(file, allow_pickle=False, **columns)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _line_start(text: Text, place: int) -> int:
    """Where the first line begins at a place or behind it."""
    if not place:
        return 0
    place -= 1
    while block := text.read(place, _LINE_BYTES):
        if (found := block.find(b"\n")) >= 0:
            return place + found + 1
        place += len(block)
    return text.size


def _requests(source: BinaryIO) -> Iterator[tuple[Path, int, int]]:
    for line in source:
        path, start, end = json.loads(line)
        yield Path(path), start, end


def main() -> None:
    """Reads a pickled job, then writes a file for each stretch asked for, and tells its rows."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the responses
    (size,) = struct.unpack("<Q", source.read(8))
    gc.disable()  # rows hold no cycles, and there are millions
    reader: ChunkReader | None = None
    job: Job = pickle.loads(source.read(size))  # noqa: S301 - by the parent process
    for path, start, end in _requests(source):
        try:
            with using(job.storage):
                reader = reader or reader_of(job)
                save_chunk(path, reader.read(start, end))
            response: dict[str, str | int | None] = {}
        except SettingsError as error:
            response = {"error": str(error)}
        except OSError as error:
            response = {"error": str(error), "errno": error.errno}
        print(json.dumps(response), file=target, flush=True)


if __name__ == "__main__":
    main()
