"""Prepares a large data set: its plan is made of the columns of its indexes, and kept with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.console import phase
from speechlm2_jax.data.bucketing import Bucket, BucketPlan
from speechlm2_jax.data.index.contents import IndexedContents, IndexedRows, KeptRows, Part
from speechlm2_jax.data.index.counting import BUCKET, CLIPS, LENGTH, POSITIONS, ROW
from speechlm2_jax.data.index.counts import VERSION
from speechlm2_jax.data.index.folders import digest, locked, prune, told_of_full_disk, writable
from speechlm2_jax.data.index.lengths import LengthsOfRows
from speechlm2_jax.data.index.list_rows import ListRows
from speechlm2_jax.data.index.packed import PackedIndex
from speechlm2_jax.data.index.storage import (
    ColumnError,
    new_folder,
    open_columns,
    read_meta,
    write_meta,
)
from speechlm2_jax.data.index.survey import MeasureRows, Survey, survey
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.data.prepare import DataKind, DataSet

PLANS_KEPT = 8
_PLANNED_BY = (
    *("sample_rate", "batch_size", "budget", "quadratic", "use_bucketing", "num_buckets"),
    *("bucket_duration_bins", "bucket_batch_size", "keep_outliers", "measure_total_length"),
    *("min_duration", "max_duration", "min_tokens", "max_tokens", "min_tpt", "max_tpt"),
    *("bucketing_2d_strict_mode", "packed", "packed_tokens", "sums_budget"),
)
"""Settings that a plan depends on."""


class RowMeasures(Protocol):
    """Measures the rows of one data set."""

    @property
    def key(self) -> list[Any]:
        """What lengths depend on, beside rows and settings."""
        ...

    def measure(self, part: int, start: int, stop: int) -> LengthsOfRows:
        """The rows of a part from `start` to `stop`."""
        ...

    def contents(self, kept: KeptRows) -> IndexedContents:
        """The conversations of the kept rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """A large data set and its buckets."""

    contents: IndexedContents
    plan: BucketPlan
    clips: np.ndarray | None
    """Recordings of each conversation; None where no group of a bucket can have too many."""
    positions: np.ndarray | None
    """LLM positions of each conversation, where rows are packed."""
    lengths: np.ndarray | None
    """Of each conversation, where batches are filled up to a sum of lengths."""
    sizes: tuple[int, ...]
    """Conversations of each source."""
    shards: tuple[tuple[int, ...], ...]
    """Of each source, those of its shards whose order is drawn anew for each pass."""
    survey: Survey

    def examples(self, cause: str) -> list[str]:
        """The names of the first rows of a cause."""
        parts = self.contents.parts
        return [parts[part].conversation(row).id for part, row in self.survey.examples[cause]]


def index_data_set(
    data_set: "DataSet", dataset: "DataKind", frame_count: FrameCount, multiple: int
) -> Indexed:
    """Plans the buckets of a large data set by its columns, or finds the plan made before.

    Raises SettingsError for what does not fit together.
    """
    config: Any = data_set.config
    parts, fields, of_source = _parts(data_set, dataset)
    rows = dataset.row_measures(parts, config, frame_count, data_set.where)
    settings = {name: getattr(config, name, None) for name in _PLANNED_BY}
    key = digest([VERSION, [part.identity for part in parts], rows.key, multiple, settings])
    found, arrays = _surveyed(parts, key, config, multiple, rows.measure)
    kept = KeptRows(fields=fields, row=arrays.get(ROW), count=sum(found.sizes), identity=key)
    return _planned(rows.contents(kept), found, arrays, of_source)


def _planned(
    contents: Any,
    found: Survey,
    arrays: Mapping[str, np.ndarray],
    of_source: Sequence[int],
) -> Indexed:
    members = found.members
    buckets = tuple(Bucket(longest=m.longest, shape=contents.shape(m)) for m in members)
    pairs = zip(buckets, members, strict=True)
    is_tight = any(b.shape.clips < m.rows * m.most_clips_up_to for b, m in pairs)
    sizes = np.zeros(max(of_source, default=-1) + 1, np.int64)
    np.add.at(sizes, list(of_source), found.sizes)
    return Indexed(
        contents=contents,
        plan=BucketPlan(buckets=buckets, bucket_of=arrays[BUCKET], members=members),
        clips=_clips(found, arrays) if is_tight or POSITIONS in arrays else None,
        positions=arrays.get(POSITIONS),
        lengths=arrays.get(LENGTH),
        sizes=tuple(sizes.tolist()),
        shards=_shards(contents, found.sizes, of_source),
        survey=found,
    )


def _clips(found: Survey, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Recordings of each conversation; without a column all have as many."""
    usual = np.uint16(found.members[0].most_clips if found.members else 0)
    return arrays.get(CLIPS, np.broadcast_to(usual, sum(found.sizes)))


def _shards(
    contents: IndexedContents, sizes: Sequence[int], of_source: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Of each source, the conversations of each of its shards, if their order is drawn.

    The order of several manifests is not.
    """
    shards: list[list[int]] = [[] for _ in range(max(of_source, default=-1) + 1)]
    row, begin = 0, 0
    for part, size, source in zip(contents.parts, sizes, of_source, strict=True):
        own = _shard_ends(part)
        if contents.row is None:
            kept = own
        else:
            kept = np.searchsorted(contents.row[begin : begin + size], row + own, side="left")
        shards[source] += [int(n) for n in np.diff(kept, prepend=0) if n and len(own) > 1]
        row, begin = row + len(part), begin + size
    return tuple(map(tuple, shards))


def _shard_ends(part: Part) -> np.ndarray:
    """The row after the last one of each shard of a part."""
    if isinstance(part, PackedIndex) and part.has_order:
        return part.shard_ends
    if isinstance(part, ListRows):
        numbers = np.asarray([one.shard for one in part.conversations], np.int64)
        return np.cumsum(np.unique(numbers, return_counts=True)[1])
    return np.asarray([len(part)])


def _parts(
    data_set: "DataSet", dataset: "DataKind"
) -> tuple[tuple[Part, ...], tuple[Mapping[str, object], ...], list[int]]:
    """The parts of all sources, more fields of their conversations, and the source of each."""
    parts: list[Part] = []
    fields: list[Mapping[str, object]] = []
    of_source: list[int] = []
    for number, source in enumerate(data_set.sources):
        rows = source.conversations
        is_indexed = isinstance(rows, IndexedRows)
        own: Sequence[Part] = (
            rows.manifests
            if is_indexed
            else [dataset.list_rows(rows, data_set.config, data_set.where)]
        )
        parts += own
        fields += [rows.fields if is_indexed else {}] * len(own)
        of_source += [number] * len(own)
    return tuple(parts), tuple(fields), of_source


def _surveyed(
    parts: Sequence[Part], key: str, config: Any, multiple: int, measure: MeasureRows
) -> tuple[Survey, dict[str, np.ndarray]]:
    """The survey of a data set and its columns, out of the folder of an index or made anew."""
    folders = next(part.folders for part in parts if part.folders)
    name = f"plan-{key}"
    if (found := _kept(folders, name)) is not None:
        return found
    folder = writable(folders)
    with locked(folder), told_of_full_disk(folder, "a plan"), phase("measuring the rows"):
        if (found := _kept(folders, name)) is not None:
            return found
        with new_folder(folder / name) as new:
            made = survey(new, [len(part) for part in parts], measure, config, multiple)
            write_meta(new, made.as_json())
        prune(folder, "plan-*", PLANS_KEPT)
    if (found := _kept((folder,), name)) is None:
        raise SettingsError(f"{folder / name}: cannot be read back")
    return found


def _kept(folders: Sequence[Path], name: str) -> tuple[Survey, dict[str, np.ndarray]] | None:
    for folder in folders:
        meta = read_meta(folder / name)
        if meta is None:
            continue
        try:
            return Survey.of_json(meta), open_columns(folder / name, meta)
        except (ColumnError, KeyError, TypeError, ValueError):
            continue
    return None
