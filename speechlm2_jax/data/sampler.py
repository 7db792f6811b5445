"""Which conversations make which batch: a pure function of the seed and the epoch.

Every host makes the same plan from the manifests alone. So no host waits for another, and a
stopped run resumes with exactly the next batch.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Real

from speechlm2_jax.data.bucketing import BucketPlan, Measures, Shape
from speechlm2_jax.data.clip_spreading import chunks, clips_by_bucket, even_groups, spread

ORDER, MIXTURE, BATCHES = range(3)
"""What a random stream is for; with the seed and the epoch they name it."""
EPOCHS_OF_SHARES = 4
"""Epochs that clips are counted in where shares draw other conversations for each."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One global batch: its bucket, and the conversations of each group."""

    bucket: int
    groups: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...] | None = None
    """The row of each conversation, where several share one (`packed`); None: each has its own."""


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
            return self.in_order(order, is_end=True)[0]
        batches = list(self._by_bucket(order))
        shuffled = self._random(BATCHES, epoch).permutation(len(batches))
        return [batches[i] for i in shuffled]

    def clips_of(self, index: int) -> int:
        """Recordings of a conversation."""
        return int(self.measures.clips[index])

    def can_replace(self, index: int, other: int) -> bool:
        """Whether a conversation of the same bucket or a shorter one fits another's place."""
        return True

    def clips_by_bucket(self) -> Int[np.ndarray, "buckets clips"] | None:
        """How many rows of each bucket have so many clips, where every row comes once an epoch."""
        if not self.by_bucket or self.shares is not None:
            return None
        return clips_by_bucket(self.measures.clips, self.plan)

    def first_buckets(self) -> Int[np.ndarray, " batches"]:
        """The bucket of each batch of the first epoch, or of some where epochs differ by shares."""
        epochs = range(1 if self.shares is None else EPOCHS_OF_SHARES)
        return np.asarray([batch.bucket for e in epochs for batch in self.epoch(e)], np.int64)

    def batches_per_pass(self) -> tuple[int, bool]:
        """The batches of the first epoch, and whether that is an estimate."""
        return len(self.epoch(0)), False

    def epoch_after(self, epoch: int, left: Sequence[int]) -> tuple[list[BatchPlan], list[int]]:
        """The batches of an epoch, and the conversations that it leaves to the next one.

        `left` are those that the epoch before it left. Only endless batches in order leave any.
        """
        if self.by_bucket or not self.endless:
            return self.epoch(epoch), []
        order = np.asarray([*left, *self._planned_order(epoch)], np.int64)
        return self.in_order(order, is_end=False)

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
        bucket_of, left = self.plan.bucket_of[order], order[:0]
        last = int(bucket_of.max(initial=-1))
        for bucket in range(last + 1):
            rows = np.concatenate([left, order[bucket_of == bucket]])
            shape, is_end = self.plan.buckets[bucket].shape, bucket == last
            found = chunks(
                *(rows, self.measures.clips[rows], shape, self.groups),
                leaves_light=True,
                is_end=is_end,
            )
            groups = np.split(found.rows, found.ends[:-1]) if len(rows) else []
            whole = found.complete * self.groups
            end = len(groups) if is_end and not self.drop_last else whole
            for first in range(0, end, self.groups):
                yield self.batch(bucket, groups[first : min(first + self.groups, end)])
            left = found.rows[found.begin_of_rest :]

    def batch(self, bucket: int, groups: Sequence[np.ndarray]) -> BatchPlan:
        """A global batch; an incomplete one is split evenly, so that no group has all padding."""
        return BatchPlan(
            bucket=bucket,
            groups=even_groups(
                groups, self.plan.buckets[bucket].shape, self.groups, self.measures.clips
            ),
        )

    def in_order(self, order: np.ndarray, *, is_end: bool) -> tuple[list[BatchPlan], list[int]]:
        """Fills batches in the order given, each in the smallest bucket that holds all of it.

        Also gives the conversations of the last one, if it is not full: where the data end it is
        a batch too (or left out, by `drop_last`).
        """
        batches, left = self._in_order(order, counts_clips=False), list[int]()
        if batches and not batches[-1].is_full and not (is_end and not self.drop_last):
            rest = batches.pop()
            left = [] if is_end else rest.indices
        return list(self._spread([batch.planned() for batch in batches])), left

    def _in_order(self, order: np.ndarray, *, counts_clips: bool) -> "list[_Filling]":
        batches: list[_Filling] = []
        for index in order.tolist():
            if not batches or not batches[-1].add(index):
                batches.append(_Filling(self, counts_clips=counts_clips))
                batches[-1].add(index)
        return batches

    def _spread(self, plans: Sequence[BatchPlan]) -> Iterator[BatchPlan]:
        """Batches in which no group has too many clips, by exchanges within a bucket.

        Where these do not help, a batch becomes several.
        """
        changed = list(plans)
        for bucket in {plan.bucket for plan in plans}:
            own = [number for number, plan in enumerate(plans) if plan.bucket == bucket]
            groups = [group for number in own for group in plans[number].groups]
            rows = np.asarray([index for group in groups for index in group], np.int64)
            ends = np.cumsum([len(group) for group in groups])
            most, costs = self.plan.buckets[bucket].shape.clips, self.costs
            rows = rows[
                spread(
                    *(self.measures.clips[rows], ends, most),
                    costs=None if costs is None or self.budget is None else costs[rows],
                    budget=self.budget or 0.0,
                )
            ]
            parts = [tuple(part.tolist()) for part in np.split(rows, ends[:-1])]
            for place, number in enumerate(own):
                begin = place * self.groups
                groups_of = tuple(parts[begin : begin + self.groups])
                changed[number] = BatchPlan(bucket=bucket, groups=groups_of)
        for plan in changed:
            shape = self.plan.buckets[plan.bucket].shape
            if all(self._clips_of(group) <= shape.clips for group in plan.groups):
                yield plan
            else:
                order = np.asarray([index for group in plan.groups for index in group], np.int64)
                yield from (b.planned() for b in self._in_order(order, counts_clips=True))

    def _clips_of(self, group: Sequence[int]) -> int:
        return int(self.measures.clips[list(group)].sum())


@dataclass
class _Filling:
    """A batch being filled, group after group, within the rows and clips of its bucket."""

    sampler: Sampler
    bucket: int = 0
    counts_clips: bool = True
    """Whether the clips of a group are limited by its shape."""
    indices: list[int] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    clips: int = 0
    costs: list[float] = field(default_factory=list)
    """Of the last group, as its clips."""

    def add(self, index: int) -> bool:
        """Takes a conversation if it fits; the bucket grows if it must."""
        bucket = max(self.bucket, int(self.sampler.plan.bucket_of[index]))
        if bucket != self.bucket:
            grown = _Filling(self.sampler, bucket, self.counts_clips)
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
        clips = self.sampler.measures.clips if self.counts_clips else None
        groups = [np.asarray(group, np.int64) for group in self.groups]
        return BatchPlan(
            bucket=self.bucket, groups=even_groups(groups, self.shape, self.sampler.groups, clips)
        )

    def _place(self, index: int) -> bool:
        sampler = self.sampler
        clips = int(sampler.measures.clips[index]) if self.counts_clips else 0
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


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to shares, adding to `total`, each at least 1."""
    exact = np.asarray(shares) * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    for index in np.argsort(counts - exact, kind="stable")[: max(total - int(counts.sum()), 0)]:
        counts[index] += 1
    return counts.tolist()
