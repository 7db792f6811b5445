"""One pass over the columns of a data set: what is left out, and which bucket each row is in."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from speechlm2_jax.data.bucketing import Measures, Members, bucket_edges
from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.index.counting import Counter, Totals
from speechlm2_jax.data.index.lengths import KEPT, LengthsOfRows
from speechlm2_jax.data.outliers import FLOORS, far_out
from speechlm2_jax.data.packing import packed_edges, packs
from speechlm2_jax.data.read_ahead import read_ahead

BLOCK_ROWS = 1 << 16
SAMPLE_ROWS = 1 << 20
"""Rows that buckets are estimated from; a smaller data set is its own sample."""
SAMPLE_STRETCHES = 256
_THREADS = 2
_LENGTHS = ("length", "positions", "clips", "samples")
Stretch = tuple[int, int, int]
"""A source, the first of its rows, and the one after the last."""


class MeasureRows(Protocol):
    """Measures rows of a part."""

    def __call__(self, part: int, start: int, stop: int) -> LengthsOfRows:
        """The rows from `start` to `stop`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a pass over all rows found."""

    members: tuple[Members, ...]
    """Of each bucket that has rows."""
    sizes: tuple[int, ...]
    """Rows of each source that are kept."""
    dropped: Mapping[str, int]
    """Rows that are left out, by cause."""
    examples: Mapping[str, list[tuple[int, int]]]
    """Of each cause the first rows (source, row); also of outliers that are kept."""
    usual: Mapping[str, float]
    """By unit: what 99 % of the rows that are no outliers have at most."""
    columns: Mapping[str, Any]
    """Those that are written: `bucket` of each kept row; `row`, its number, unless all are kept;
    `clips`, unless all have as many; `positions` of packed rows, `length` where it is summed."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, which `Survey.of_json` reads."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Survey":
        """The survey of plain values. Raises KeyError or TypeError for others."""
        return cls(
            members=tuple(Members(**members) for members in values["members"]),
            sizes=tuple(values["sizes"]),
            examples={k: [(s, r) for s, r in rows] for k, rows in values["examples"].items()},
            **{name: values[name] for name in ("dropped", "usual", "columns")},
        )


def survey(
    folder: Path, sizes: Sequence[int], measure: MeasureRows, config: LoaderConfig, multiple: int
) -> Survey:
    """Goes through all rows once, and writes the columns of the plan into a folder.

    Args:
        folder: which gets `bucket.npy` and, where they are needed, `row.npy` and `clips.npy`.
        sizes: rows of each source.
        measure: their lengths.
        config: what to leave out, and the batch settings.
        multiple: LLM positions of a shape are padded up to it.
    """
    counter = _estimated(sizes, measure, config, multiple)
    totals = Totals(folder, counter, sizes)
    counted = read_ahead(
        _stretches(sizes, BLOCK_ROWS),
        lambda stretch: counter.count(measure(*stretch)),
        ahead=2 * _THREADS,
        threads=_THREADS,
    )
    for (source, start, stop), future in counted:
        totals.add(source, start, future.result(), stop - start)
    members, columns = totals.finish()
    return Survey(
        members=members,
        sizes=tuple(totals.sizes),
        dropped=totals.dropped,
        examples=totals.examples,
        usual=counter.usual,
        columns=columns,
    )


def _estimated(
    sizes: Sequence[int], measure: MeasureRows, config: LoaderConfig, multiple: int
) -> Counter:
    """From a sample: what is usual, and the edges of the buckets."""
    stretches, total = _stretches(sizes, BLOCK_ROWS), sum(sizes)
    if total > SAMPLE_ROWS:
        rows = SAMPLE_ROWS // SAMPLE_STRETCHES
        begins = np.linspace(0, total - rows, SAMPLE_STRETCHES).astype(int).tolist()
        stretches = _within(sizes, [(begin, begin + rows) for begin in begins])
    found = [measure(*stretch) for stretch in stretches]
    is_kept = np.concatenate([one.cause for one in found]) == KEPT
    usual: dict[str, float] = {}
    for unit in FLOORS:
        values = np.concatenate([getattr(one, unit) for one in found])
        is_far, usual[unit] = far_out(np.where(is_kept, values, 0), unit)
        if not config.keep_outliers:
            is_kept &= ~is_far
    kept = {
        name: np.concatenate([getattr(one.measures, name) for one in found])[is_kept]
        for name in _LENGTHS
    }
    measures = Measures(**kept)
    edges = (
        packed_edges(measures, config)
        if packs(config)
        else bucket_edges(measures, config, multiple, least_padding=True)
    )
    return Counter(config=config, edges=edges, usual=usual, multiple=multiple)


def _stretches(sizes: Sequence[int], rows: int) -> Iterator[Stretch]:
    for source, size in enumerate(sizes):
        for start in range(0, size, rows):
            yield source, start, min(start + rows, size)


def _within(sizes: Sequence[int], ranges: Iterable[tuple[int, int]]) -> Iterator[Stretch]:
    """Ranges of rows that are counted over all sources."""
    firsts = [0, *itertools.accumulate(sizes)]
    for begin, end in ranges:
        for source, size in enumerate(sizes):
            start, stop = max(begin - firsts[source], 0), min(end - firsts[source], size)
            if start < stop:
                yield source, start, stop
