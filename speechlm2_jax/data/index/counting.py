"""Sums and maxima of each bucket over all rows, and the columns of a plan as they are written."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.bucketing import Measures, Members, rows_of
from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.index.lengths import KEPT, LengthsOfRows
from speechlm2_jax.data.index.storage import ColumnWriter
from speechlm2_jax.data.outliers import FACTOR, FAR, FLOORS
from speechlm2_jax.data.packed_members import Sums, packed_members
from speechlm2_jax.data.packing import bucketed, packs, tokens_of_rows

NAMED = 11
"""Rows that are remembered of each cause: one more than the log names."""
LONGER = "longer_than_buckets"
BUCKET, ROW, CLIPS, POSITIONS, LENGTH = "bucket", "row", "clips", "positions", "length"
_BLOCK_ROWS = 1 << 20
_SUMS, _MOST = 7, 5
_PRODUCTS, _SQUARES, _LENGTHS = 4, 5, 6
"""Places of sums that some settings need."""
_LEAST = 4
"""Place of minus the fewest positions among maxima."""
_USUAL_LENGTHS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What is counted of a stretch of rows."""

    bucket: np.ndarray
    """Of the rows that are kept."""
    clips: np.ndarray
    """Of the same."""
    rows: np.ndarray | None
    """Their numbers from the start of the stretch; None: all are kept."""
    more: Mapping[str, np.ndarray]
    """Of the same: the columns that batches are filled by, beside clips."""
    sums: np.ndarray
    """[buckets, 7] rows, positions, clips, squares of clips; of packed rows, products of clips and
    positions, and squares of positions; of batches that are filled up to a sum, lengths."""
    most: np.ndarray
    """[buckets, 5] length, positions, clips, samples; of packed rows, minus the fewest positions.
    """
    causes: Mapping[str, np.ndarray]
    """Rows of each cause, from the start of the stretch."""
    is_whole: bool
    """Whether lengths are whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Decides about rows and counts them, a stretch at a time; several at once."""

    config: LoaderConfig
    edges: np.ndarray
    """Upper ends of the buckets."""
    usual: Mapping[str, float]
    """By unit: what the rows that are no outliers have at most; 0 where that is not known."""
    multiple: int = 1
    """LLM positions of a shape are padded up to it."""

    @property
    def columns(self) -> Mapping[str, np.dtype]:
        """The columns that batches are filled by, beside clips."""
        config = self.config
        if packs(config):
            most = self.most_positions
            return {POSITIONS: np.dtype(np.uint32) if most is None else np.min_scalar_type(most)}
        return {LENGTH: np.dtype(np.uint32)} if self.sums_lengths else {}

    @property
    def most_positions(self) -> int | None:
        """Of a packed row; None: that of the longest."""
        config = self.config
        if not packs(config) or config.packed_tokens is None:
            return None
        return tokens_of_rows(config, 0, self.multiple)

    @property
    def sums_lengths(self) -> bool:
        """Whether batches are filled up to a sum of lengths."""
        return self.config.sums_budget and self.config.budget is not None

    def count(self, found: LengthsOfRows) -> Counted:
        """Counts a stretch."""
        causes = self._causes(found)
        is_kept = found.cause == KEPT
        for name, rows in causes.items():
            if not (name.endswith(FAR) and self.config.keep_outliers):
                is_kept[rows] = False
        measures = found.measures
        config = self.config
        of_rows = bucketed(measures, config) if packs(config) else measures.bucketed
        bucket = self._bucket_of(of_rows)
        rows = None if is_kept.all() else np.flatnonzero(is_kept)
        if rows is not None:
            bucket, measures = bucket[rows], measures.take(rows)
        sums, most = self._of_buckets(bucket, measures)
        return Counted(
            bucket=bucket,
            clips=measures.clips,
            rows=rows,
            more={name: getattr(measures, name) for name in self.columns},
            sums=sums,
            most=most,
            causes=causes,
            is_whole=np.issubdtype(measures.length.dtype, np.integer),
        )

    def _bucket_of(self, length: np.ndarray) -> np.ndarray:
        """The bucket of each row."""
        is_whole = np.issubdtype(length.dtype, np.integer)
        if not is_whole or length.max(initial=0) >= len(self._of_length):
            return np.searchsorted(self.edges, length, side="left").astype(self.dtype)
        return self._of_length[length]

    @property
    def dtype(self) -> np.dtype:
        """That holds the number of a bucket."""
        return np.min_scalar_type(len(self.edges) + 1)

    @functools.cached_property
    def _of_length(self) -> np.ndarray:
        """The bucket of every usual length: a table is faster than a search."""
        lengths = np.arange(_USUAL_LENGTHS)
        return np.searchsorted(self.edges, lengths, side="left").astype(self.dtype)

    def _causes(self, found: LengthsOfRows) -> dict[str, np.ndarray]:
        """The rows of each cause; a row has one."""
        is_left = found.cause == KEPT
        causes: dict[str, np.ndarray] = {}
        if not is_left.all():
            for number in np.unique(found.cause).tolist():
                if 0 < number <= len(found.causes):
                    causes[found.causes[int(number) - 1]] = np.flatnonzero(found.cause == number)
        tests = {
            f"{unit}{FAR}": getattr(found, unit) > max(FACTOR * usual, FLOORS[unit])
            for unit, usual in self.usual.items()
            if usual
        }
        if self.config.bucket_batch_size is not None:
            tests[LONGER] = found.measures.bucketed > self.edges[-1]
        if self.most_positions:
            tests[LONGER] = found.measures.positions > self.most_positions
        for name, test in tests.items():
            if (is_left & test).any():
                causes[name] = np.flatnonzero(is_left & test)
                is_left &= ~test
        return causes

    def _of_buckets(self, bucket: np.ndarray, measures: Measures) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.edges) + 1
        sums, most = np.zeros((count, _SUMS), np.int64), np.zeros((count, _MOST))
        most[:, _LEAST] = -np.inf
        if not len(bucket):
            return sums, most
        order = np.argsort(bucket, kind="stable")  # a radix sort, as it is of small numbers
        sums[:, 0] = np.bincount(bucket, minlength=count)
        has_rows = sums[:, 0] > 0
        first = (np.cumsum(sums[:, 0]) - sums[:, 0])[has_rows]
        positions, clips = measures.positions[order], measures.clips
        sums[has_rows, 1] = np.add.reduceat(positions, first)
        most[has_rows, 0] = np.maximum.reduceat(measures.length[order], first)
        most[has_rows, 1] = np.maximum.reduceat(positions, first)
        most[has_rows, 3] = np.maximum.reduceat(measures.samples[order], first)
        if self.sums_lengths:
            sums[has_rows, _LENGTHS] = np.add.reduceat(measures.length[order], first)
        if packs(self.config):
            most[has_rows, _LEAST] = np.maximum.reduceat(-positions, first)
            sums[has_rows, _PRODUCTS] = np.add.reduceat(clips[order] * positions, first)
            sums[has_rows, _SQUARES] = np.add.reduceat(positions**2, first)
        if clips.min() == (usual := clips.max()):
            most[has_rows, 2] = usual
            sums[:, 2:4] = sums[:, :1] * [usual, usual**2]
            return sums, most
        clips = clips[order]
        most[has_rows, 2] = np.maximum.reduceat(clips, first)
        sums[has_rows, 2] = np.add.reduceat(clips, first)
        sums[has_rows, 3] = np.add.reduceat(clips**2, first)
        return sums, most


class Totals:
    """What all stretches have together; they are added in order."""

    def __init__(self, folder: Path, counter: Counter, sizes: Sequence[int]) -> None:
        self._folder, self._counter = folder, counter
        self._buckets = len(counter.edges) + 1
        self._sums = np.zeros((self._buckets, _SUMS), object)  # integers without a bound
        self._most = np.zeros((self._buckets, _MOST))
        self._most[:, _LEAST] = -np.inf
        self._is_whole = True
        self.sizes = [0] * len(sizes)
        """Rows of each source that are kept."""
        self._firsts = np.cumsum([0, *sizes]).tolist()
        self.dropped: dict[str, int] = {}
        """Rows that are left out, by cause."""
        self.examples: dict[str, list[tuple[int, int]]] = {}
        """Of each cause the first rows (source, row); also of outliers that are kept."""
        number = np.uint32 if sum(sizes) < 1 << 32 else np.uint64
        self._bucket = ColumnWriter(folder / "raw.npy", counter.dtype)
        self._row = _LateColumn(folder / f"{ROW}.npy", number, np.arange)
        self._clips: _LateColumn | None = None
        self._more = {
            name: ColumnWriter(folder / f"{name}.npy", kind)
            for name, kind in counter.columns.items()
        }

    def add(self, source: int, start: int, found: Counted, rows: int) -> None:
        """Adds a stretch of `rows` rows of a source."""
        self._sums += found.sums
        self._most = np.maximum(self._most, found.most)
        self._is_whole &= found.is_whole
        self.sizes[source] += len(found.bucket)
        for name, own in found.causes.items():
            is_dropped = not (name.endswith(FAR) and self._counter.config.keep_outliers)
            if is_dropped:
                self.dropped[name] = self.dropped.get(name, 0) + len(own)
            known = self.examples.setdefault(name, [])
            known += [(source, start + row) for row in own[: NAMED - len(known)].tolist()]
        self._bucket.append(found.bucket)
        for name, writer in self._more.items():
            writer.append(found.more[name])
        first = self._firsts[source] + start
        self._row.append(first + (np.arange(rows) if found.rows is None else found.rows))
        if len(found.clips):
            if self._clips is None:
                usual = int(found.clips[0])
                self._clips = _LateColumn(
                    self._folder / f"{CLIPS}.npy", np.uint16, lambda a, b: np.full(b - a, usual)
                )
            self._clips.append(found.clips)

    def finish(self) -> tuple[tuple[Members, ...], dict[str, Any]]:
        """The buckets that have rows, and what is written of each column."""
        present = np.flatnonzero(self._sums[:, 0] > 0)
        written = self._bucket.finish()
        lookup = np.zeros(self._buckets, written["dtype"])
        lookup[present] = np.arange(len(present))
        if len(present) == self._buckets:
            (self._folder / "raw.npy").rename(self._folder / f"{BUCKET}.npy")
        else:
            written = self._renumbered(lookup)
        columns: dict[str, Any] = {BUCKET: written}
        for name, late in ((ROW, self._row), (CLIPS, self._clips)):
            if late is not None and (of_column := late.finish()) is not None:
                columns[name] = of_column
        columns |= {name: writer.finish() for name, writer in self._more.items()}
        return self._all_members(present), columns

    def _all_members(self, present: np.ndarray) -> tuple[Members, ...]:
        config: Any = self._counter.config
        if not packs(config):
            return tuple(self._members(int(bucket)) for bucket in present)
        sums = [self._packed(int(bucket)) for bucket in present]
        longest = int(self._most[:, 1].max(initial=1))
        tokens = tokens_of_rows(config, longest, self._counter.multiple)
        return packed_members(sums, config, tokens, self._counter.multiple)

    def _packed(self, bucket: int) -> Sums:
        """What a bucket of packed rows is planned for."""
        count, positions, clips, squares, products, positions_squared, _ = self._sums[bucket]
        longest, most_positions, most_clips, samples, least = self._most[bucket].tolist()
        return Sums(
            count=count,
            positions=positions,
            clips=clips,
            clips_squared=squares,
            clips_by_positions=products,
            positions_squared=positions_squared,
            longest=int(longest) if self._is_whole else longest,
            most_clips=int(most_clips),
            most_samples=int(samples),
            least_positions=-int(least),
            most_positions=int(most_positions),
        )

    def _renumbered(self, lookup: np.ndarray) -> dict[str, Any]:
        """Writes the bucket of each row again, those without rows left out."""
        raw = self._folder / "raw.npy"
        writer, values = ColumnWriter(self._folder / f"{BUCKET}.npy", lookup.dtype), np.load(raw)
        writer.append(lookup[values])
        raw.unlink()
        return writer.finish()

    def _members(self, bucket: int) -> Members:
        count, filled, clips, squares = self._sums[bucket, :4].tolist()
        longest, _, most_clips = self._most[bucket, :3].tolist()
        longest = int(longest) if self._is_whole else longest
        _, positions, clips_up_to, samples = self._most[: bucket + 1, :4].max(axis=0).tolist()
        rows, lengths = self._sums[: bucket + 1, [0, _LENGTHS]].sum(axis=0).tolist()
        variance = max(squares / count - (clips / count) ** 2, 0.0)
        return Members(
            count=count,
            longest=longest,
            filled=filled,
            clips_mean=clips / count,
            clips_std=variance**0.5 if most_clips * count != clips else 0.0,
            most_clips=int(most_clips),
            most_clips_up_to=int(clips_up_to),
            positions_up_to=int(positions),
            samples_up_to=int(samples),
            rows=rows_of(
                longest,
                bucket,
                self._counter.config,
                mean=lengths / rows if self._counter.sums_lengths else None,
            ),
            multiple=self._counter.multiple,
        )


class _LateColumn:
    """A column that is written only from the first row on that is not as usual.

    Args:
        path: where.
        dtype: of what is written.
        usual: the values of rows [begin, end).
    """

    def __init__(
        self, path: Path, dtype: np.typing.DTypeLike, usual: Callable[[int, int], np.ndarray]
    ) -> None:
        self._path, self._dtype, self._usual = path, dtype, usual
        self._rows, self._writer = 0, None

    def append(self, values: np.ndarray) -> None:
        """Adds some rows."""
        begin, self._rows = self._rows, self._rows + len(values)
        if self._writer is None:
            if np.array_equal(values, self._usual(begin, self._rows)):
                return
            self._writer = ColumnWriter(self._path, self._dtype)
            for start in range(0, begin, _BLOCK_ROWS):
                self._writer.append(self._usual(start, min(start + _BLOCK_ROWS, begin)))
        self._writer.append(values)

    def finish(self) -> Mapping[str, Any] | None:
        """What is written; None: nothing had to be."""
        return None if self._writer is None else self._writer.finish()
