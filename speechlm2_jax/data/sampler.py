"""Which conversations make which batch: a pure function of the seed and the epoch.

Every host makes the same plan from the manifests alone. So no host waits for another, and a
stopped run resumes with exactly the next batch.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Int, Real

from speechlm2_jax.data.bucketing import BucketPlan, Measures, Shape

ORDER, MIXTURE, BATCHES = range(3)
"""What a random stream is for; with the seed and the epoch they name it."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One global batch: its bucket, and the conversations of each group."""

    bucket: int
    groups: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...] | None = None
    """The row of each conversation, where several share one (`packed`); None: each has its own."""


class Filling(Protocol):
    """A batch that may take more."""

    @property
    def indices(self) -> list[int]:
        """Its conversations, in order."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether it takes no more."""
        ...

    def planned(self) -> BatchPlan:
        """The batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Plans epochs of global batches of so many groups.

    In an epoch every conversation comes once. If sources have shares, an epoch is as long, but
    each source gives its share of it and continues from its position in the next epoch.
    """

    plan: BucketPlan
    measures: Measures
    sizes: tuple[int, ...]
    """Conversations of each source; their indices follow one another."""
    shares: tuple[float, ...] | None = None
    groups: int = 1
    seed: int = 0
    shuffle: bool = False
    by_bucket: bool = False
    """Batches of one bucket each, in random order; else in the order of the conversations."""
    drop_last: bool = False
    budget: float | None = None
    """What the `costs` of a group may sum to; None: as much as its shape holds.

    As in NeMo, a group takes one more, whatever it costs, if one like its costliest would fit.
    """
    costs: Real[np.ndarray, " N"] | None = None
    """What each conversation counts against the budget."""
    endless: bool = False
    """Whether batches in order are filled across the end of an epoch, as those of NeMo's streams:
    SHAR, conversations, and mixtures, whose sources it also interleaves."""
    shards: tuple[tuple[int, ...], ...] = ()
    """Of each source, the conversations of its shards, whose order is drawn anew for each pass."""
    shard_seeds: tuple[int, ...] = ()
    """Of each source; with an integer `shard_seed` the order of its shards is NeMo's."""

    def epoch(self, epoch: int) -> list[BatchPlan]:
        """The batches of one epoch alone, in order."""
        order = self._planned_order(epoch)
        if not self.by_bucket:
            batches, left = self.in_order(order)
            return [*batches, *self._rest(left)]
        batches = list(self._by_bucket(order))
        shuffled = self._random(BATCHES, epoch).permutation(len(batches))
        return [batches[i] for i in shuffled]

    def clips_of(self, index: int) -> int:
        """Recordings of a conversation."""
        return int(self.measures.clips[index])

    def can_replace(self, index: int, other: int) -> bool:
        """Whether a conversation of the same bucket or a shorter one fits another's place."""
        return True

    def batches_per_pass(self) -> tuple[int, bool]:
        """The batches of the first epoch, and whether that is an estimate."""
        return len(self.epoch(0)), False

    def epoch_after(self, epoch: int, left: Sequence[int]) -> tuple[list[BatchPlan], list[int]]:
        """The batches of an epoch, and the conversations that it leaves to the next one.

        `left` are those that the epoch before it left. Only endless batches in order leave any.
        """
        if self.by_bucket or not self.endless:
            return self.epoch(epoch), []
        batches, rest = self.in_order(np.asarray([*left, *self._planned_order(epoch)], np.int64))
        if rest.is_full:
            return [*batches, rest.planned()], []
        return batches, rest.indices

    def _planned_order(self, epoch: int) -> Int[np.ndarray, " n"]:
        order = self._order(epoch)
        return order[self.plan.bucket_of[order] >= 0]

    def _random(self, purpose: int, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, *key])

    def _order(self, epoch: int) -> Int[np.ndarray, " n"]:
        total, starts = sum(self.sizes), np.cumsum([0, *self.sizes])
        is_mixed = self.endless and len(self.sizes) > 1
        if self.shares is None and self.shuffle:
            return self._random(ORDER, epoch).permutation(total)
        if self.shares is None and not is_mixed:
            passes = [start + self._pass(s, epoch) for s, start in enumerate(starts[:-1])]
            return np.concatenate([*passes, np.zeros(0, np.int64)])
        counts = self.sizes if self.shares is None else apportion(self.shares, total)
        streams = [
            starts[s] + self._stretch(s, epoch * n, n)
            for s, n in enumerate(counts)
            if self.sizes[s]
        ]
        turns = np.repeat(np.arange(len(streams)), [len(stream) for stream in streams])
        turns = self._random(MIXTURE, epoch).permutation(turns)
        iterators = [iter(stream) for stream in streams]
        return np.asarray([next(iterators[s]) for s in turns], np.int64)

    def _stretch(self, source: int, start: int, count: int) -> Int[np.ndarray, " n"]:
        """The next `count` conversations of a source that is gone through again and again."""
        size = self.sizes[source]
        passes = range(start // size, -(-(start + count) // size))
        rounds = [
            self._random(ORDER, source, p).permutation(size)
            if self.shuffle
            else self._pass(source, p)
            for p in passes
        ]
        begin = start % size
        return np.concatenate([*rounds, np.zeros(0, np.int64)])[begin : begin + count]

    def _pass(self, source: int, number: int) -> Int[np.ndarray, " n"]:
        """A source in the order of its manifest; shards come in an order drawn for each pass.

        Drawn as Lhotse draws it, so that an integer `shard_seed` gives NeMo's order.
        """
        whole = np.arange(self.sizes[source])
        shards = self.shards[source] if self.shards else ()
        if len(shards) < 2:
            return whole
        order = list(np.split(whole, np.cumsum(shards)[:-1]))
        random.Random(self.shard_seeds[source] + number).shuffle(order)  # noqa: S311
        return np.concatenate(order)

    def _by_bucket(self, order: np.ndarray) -> Iterator[BatchPlan]:
        """Fills batches bucket by bucket; what is left of one moves up into the next."""
        bucket_of, left = self.plan.bucket_of[order], []
        last = int(bucket_of.max(initial=-1))
        for bucket in range(last + 1):
            batch = _Filling(self, bucket)
            for index in [*left, *order[bucket_of == bucket].tolist()]:
                if not batch.add(index):
                    yield batch.planned()
                    batch = _Filling(self, bucket)
                    batch.add(index)
            left = batch.indices
            if batch.is_full or (bucket == last and left and not self.drop_last):
                yield batch.planned()
                left = []

    def in_order(self, order: np.ndarray) -> "tuple[list[BatchPlan], Filling]":
        """Fills batches in the order given, each in the smallest bucket that holds all of it.

        The last one, which may not be full, is given as it is.
        """
        batches, batch = [], _Filling(self)
        for index in order.tolist():
            if not batch.add(index):
                batches.append(batch.planned())
                batch = _Filling(self)
                batch.add(index)
        return batches, batch

    def _rest(self, batch: Filling) -> list[BatchPlan]:
        is_wanted = batch.indices and (batch.is_full or not self.drop_last)
        return [batch.planned()] if is_wanted else []


@dataclass
class _Filling:
    """A batch being filled, group after group, within the rows and clips of its bucket."""

    sampler: Sampler
    bucket: int = 0
    indices: list[int] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    clips: int = 0
    costs: list[float] = field(default_factory=list)
    """Of the last group, as its clips."""

    def add(self, index: int) -> bool:
        """Takes a conversation if it fits; the bucket grows if it must."""
        bucket = max(self.bucket, int(self.sampler.plan.bucket_of[index]))
        if bucket != self.bucket:
            grown = _Filling(self.sampler, bucket)
            if not all(grown._place(i) for i in [*self.indices, index]):
                return False
            self.__dict__.update(grown.__dict__)
            return True
        return self._place(index)

    @property
    def shape(self) -> Shape:
        return self.sampler.plan.buckets[self.bucket].shape

    @property
    def is_full(self) -> bool:
        return len(self.indices) == self.shape.sequences * self.sampler.groups

    def planned(self) -> BatchPlan:
        """The batch; an incomplete one is split evenly, so that no group has all the padding."""
        groups = self.groups
        if not self.is_full:
            even = [g.tolist() for g in np.array_split(self.indices, self.sampler.groups)]
            if all(self._clips_of(group) <= self.shape.clips for group in even):
                groups = even
        groups = [*groups, *[[]] * (self.sampler.groups - len(groups))]
        return BatchPlan(bucket=self.bucket, groups=tuple(tuple(map(int, g)) for g in groups))

    def _place(self, index: int) -> bool:
        sampler = self.sampler
        clips = int(sampler.measures.clips[index])
        cost = 0.0 if sampler.costs is None else float(sampler.costs[index])
        opens = (
            not self.groups
            or len(self.groups[-1]) == self.shape.sequences
            or self.clips + clips > self.shape.clips
            or (sampler.budget is not None and not self._is_within(sampler.budget, cost))
        )
        if opens:
            if len(self.groups) == sampler.groups:
                return False
            self.groups.append([])
            self.clips, self.costs = 0, []
        self.groups[-1].append(index)
        self.indices.append(index)
        self.clips, self.costs = self.clips + clips, [*self.costs, cost]
        return True

    def _is_within(self, budget: float, cost: float) -> bool:
        costliest = max(self.costs, default=0.0)
        return sum(self.costs) + cost <= budget or (len(self.costs) + 1) * costliest <= budget

    def _clips_of(self, group: Sequence[int]) -> int:
        return int(self.sampler.measures.clips[list(group)].sum())


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to shares, adding to `total`, each at least 1."""
    exact = np.asarray(shares) * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    for index in np.argsort(counts - exact, kind="stable")[: max(total - int(counts.sum()), 0)]:
        counts[index] += 1
    return counts.tolist()
