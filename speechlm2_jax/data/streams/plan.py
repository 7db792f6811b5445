"""Plans the shapes of a stream, and how often each comes, from a sample of its rows."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.bucketing import (
    BucketPlan,
    Measures,
    Members,
    Shape,
    bucket_edges,
    describe,
    plan_buckets,
)
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.outliers import FAR, find_outliers
from speechlm2_jax.data.plan_report import report
from speechlm2_jax.data.prepare import Contents, DataSet, kept
from speechlm2_jax.data.storage.access import using
from speechlm2_jax.data.streams.events import Pool
from speechlm2_jax.data.streams.schedule import Schedule, step_shares
from speechlm2_jax.data.streams.shards import PoolShard, StreamRows
from speechlm2_jax.data.tar_headers import TarMember
from speechlm2_jax.settings import SettingsError

SAMPLED_SHARDS = 16
"""Of each source, spread over all."""
HEADROOM = 1.1
"""How much longer than the longest of an incomplete sample an example may be."""
_NO_MEMBER = TarMember("", 0, 0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamSampler:
    """How batches are made of the shards of several pools."""

    plan: BucketPlan
    """Its members are those of a sample."""
    limits: Float[np.ndarray, " B"]
    """Of each bucket, the longest length (or the number of the 2-D bin)."""
    schedule: Schedule
    pools: tuple[Pool, ...]
    rows: float
    """About how many examples an epoch has."""
    seed: int
    shuffle: bool
    buffer_size: int
    """Examples that wait in each group."""
    groups: int = 1
    endless: bool = True

    @property
    def shapes(self) -> list[Shape]:
        """The shape of each bucket."""
        return [bucket.shape for bucket in self.plan.buckets]

    def bucket_of(self, measures: Measures) -> Int[np.ndarray, " n"]:
        """The smallest bucket whose shape holds each example; -1: none."""
        found = np.full(len(measures), -1, np.int64)
        for bucket in range(len(self.limits) - 1, -1, -1):
            shape: Any = self.plan.buckets[bucket].shape
            is_last = bucket + 1 == len(self.limits)
            fits = measures.positions <= shape.tokens
            fits &= measures.samples <= getattr(shape, "samples", np.inf)
            fits &= measures.clips <= shape.clips
            if not is_last or measures.bins is not None:
                fits &= measures.bucketed <= self.limits[bucket]
            found[fits] = bucket
        return found

    def batches_per_pass(self) -> tuple[int, bool]:
        """About how many steps an epoch takes."""
        rows = np.asarray([shape.sequences for shape in self.shapes])
        per_step = float(np.dot(self.schedule.shares, rows)) * self.groups
        return max(round(self.rows / per_step), 1), True


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Rows of all sources."""

    conversations: list[Conversation]
    source: Int[np.ndarray, " N"]
    """The source of each."""
    rows: Float[np.ndarray, " sources"]
    """About how many each source has."""
    is_complete: bool


def plan_stream(
    data_set: DataSet, dataset: Any, frame_count: FrameCount, groups: int, multiple: int, seed: int
) -> tuple[Contents, StreamSampler]:
    """Plans a stream, and logs its buckets. Raises SettingsError for what cannot be planned."""
    config: Any = data_set.config
    assert isinstance(config, DataLoaderConfig)
    with using(config.storage):
        sample = _sampled(data_set, dataset, config.num_cuts_for_bins_estimate)
    contents, source, dropped = _filtered(data_set, dataset, sample, frame_count)
    measures = contents.measures
    plan = plan_buckets(measures, config, contents.shape, multiple)
    if not sample.is_complete:
        plan = _with_headroom(plan, contents)
    in_plan = plan.bucket_of >= 0
    if not in_plan.any():
        raise SettingsError(f"{data_set.where}: no bucket holds any of {len(measures)} examples")
    weights = _weights(data_set, sample, source, in_plan)
    counts = np.bincount(np.maximum(plan.bucket_of, 0), weights, len(plan.buckets))
    shapes = [bucket.shape for bucket in plan.buckets]
    shares = step_shares(counts, np.asarray([shape.sequences for shape in shapes], np.float64))
    limits = _limits(measures, config, plan, multiple)
    kept_share = len(measures) / max(len(sample.conversations), 1)
    sampler = StreamSampler(
        plan=plan,
        limits=limits,
        schedule=Schedule(shares=tuple(shares), seed=seed),
        pools=_pools(data_set, dataset, seed),
        rows=float(sample.rows.sum()) * kept_share,
        seed=seed,
        shuffle=config.shuffle,
        buffer_size=max(config.shuffle_buffer_size, 2 * max(s.sequences for s in shapes)),
        groups=groups,
    )
    _tell(data_set, sample, sampler, contents, dropped)
    return contents, sampler


def _tell(
    data_set: DataSet,
    sample: _Sample,
    sampler: StreamSampler,
    contents: Contents,
    dropped: dict[str, list[str]],
) -> None:
    shards = [len(pool.shards) for pool in sampler.pools]
    _log.info(
        "%s: a stream of %d shards, about %d examples an epoch; shapes are planned by %d of them",
        *(data_set.where, sum(shards), round(sampler.rows), len(sample.conversations)),
    )
    counts = {cause: len(ids) for cause, ids in dropped.items()}
    report(data_set.where, describe(sampler.plan, contents.columns), counts, dropped)
    for pool, count in zip(sampler.pools, shards, strict=True):
        if count < sampler.groups:
            _log.warning(
                "%s: %s has %d shards for %d data-parallel groups: several groups read the same "
                "tar, each a part of its members; make at least %d shards",
                *(data_set.where, pool.shards[0].source, count, sampler.groups, sampler.groups),
            )


def _sampled(data_set: DataSet, dataset: Any, most: int) -> _Sample:
    conversations: list[Conversation] = []
    numbers: list[int] = []
    totals: list[float] = []
    per_source, is_complete = max(most // len(data_set.sources), 1), True
    for number, source in enumerate(data_set.sources):
        rows: Any = source.conversations
        assert isinstance(rows, StreamRows)
        step = -(-len(rows.shards) // SAMPLED_SHARDS)
        chosen = rows.shards[::step]
        found, total = list[Conversation](), 0
        for shard in chosen:
            listed = shard.rows().left()
            total += len(listed)
            every = max(-(-len(listed) * len(chosen) // per_source), 1)
            is_complete &= every == 1 and step == 1
            for row in listed[::every]:
                found += dataset.variants(
                    [row.make(None, None if row.is_unpacked else _NO_MEMBER)], data_set.config
                )
        conversations += found
        numbers += [number] * len(found)
        totals.append(total * len(rows.shards) / len(chosen))
    if not conversations:
        raise SettingsError(f"{data_set.where}: the manifests are empty")
    return _Sample(
        conversations=conversations,
        source=np.asarray(numbers, np.int64),
        rows=np.asarray(totals),
        is_complete=is_complete,
    )


def _filtered(
    data_set: DataSet, dataset: Any, sample: _Sample, frame_count: FrameCount
) -> tuple[Contents, np.ndarray, dict[str, list[str]]]:
    """What of a sample can be used: with the source of each, and the ids of the rest by cause."""
    config, where = data_set.config, data_set.where
    contents: Contents = dataset.contents(sample.conversations, config, frame_count, where)
    keep, dropped = kept(contents)
    if not config.keep_outliers:
        for unit, rows in find_outliers(contents.lengths(), keep, contents.conversations).items():
            keep[list(rows)] = False
            dropped[f"{unit}{FAR}"] = list(rows.values())
    if not keep.any():
        counts = {cause: len(ids) for cause, ids in dropped.items()}
        raise SettingsError(f"{where}: no conversation of the sample is left; left out: {counts}")
    chosen = np.flatnonzero(keep)
    return contents.take(chosen), sample.source[chosen], dropped


def _weights(
    data_set: DataSet, sample: _Sample, source: np.ndarray, in_plan: np.ndarray
) -> np.ndarray:
    """How many examples of the stream each of a sample stands for; none if no bucket holds it.

    Shares are those of the examples that are trained on.
    """
    shares = [one.share for one in data_set.sources]
    given, sampled = sample.rows, np.bincount(sample.source, minlength=len(sample.rows))
    if None not in shares:
        given = np.asarray(shares, np.float64)
        sampled = np.bincount(source[in_plan], minlength=len(given))
    return in_plan * given[source] / np.maximum(sampled[source], 1)


def _with_headroom(plan: BucketPlan, contents: Contents) -> BucketPlan:
    """The plan with room in its last bucket for what a sample does not hold."""
    last: Members = plan.members[-1]
    larger = replace(
        last,
        positions_up_to=int(last.positions_up_to * HEADROOM),
        samples_up_to=int(last.samples_up_to * HEADROOM),
    )
    bucket = replace(plan.buckets[-1], shape=contents.shape(larger))
    return replace(plan, buckets=(*plan.buckets[:-1], bucket))


def _limits(
    measures: Measures, config: DataLoaderConfig, plan: BucketPlan, multiple: int
) -> Float[np.ndarray, " B"]:
    """The upper end of each bucket that has members, in what buckets are chosen by."""
    edges = np.append(bucket_edges(measures, config, multiple), np.inf)
    own = np.searchsorted(edges[:-1], measures.bucketed, side="left")
    has_limit = config.bucket_batch_size is not None
    present = sorted(set(own.tolist()) - ({len(edges) - 1} if has_limit else set()))
    assert len(present) == len(plan.buckets)
    return edges[present]


def _pools(data_set: DataSet, dataset: Any, seed: int) -> tuple[Pool, ...]:
    """One pool of all sources, or one of each where they have shares."""
    config: Any = data_set.config
    parts = list(_shards_of_sources(data_set))
    is_weighted = all(source.share is not None for source in data_set.sources)
    joined = parts if is_weighted else [[shard for part in parts for shard in part]]
    seeds = [source.shard_seed for source in data_set.sources]
    return tuple(
        Pool(
            shards=shards,
            seed=seed if seeds[number] is None else seeds[number] or 0,
            is_shuffled=config.shuffle or any(one.shard.is_shuffled for one in shards),
            share=(data_set.sources[number].share or 0.0) if is_weighted else 1.0,
            storage=config.storage,
            variants=lambda conversations: dataset.variants(conversations, config),
        )
        for number, shards in enumerate(joined)
    )


def _shards_of_sources(data_set: DataSet) -> Iterator[Sequence[PoolShard]]:
    for source in data_set.sources:
        rows: Any = source.conversations
        yield [
            PoolShard(
                shard=shard,
                source=source.name,
                skip_missing=rows.skip_missing,
                fields=rows.fields,
            )
            for shard in rows.shards
        ]
