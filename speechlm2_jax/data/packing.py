"""Packing: rows of a fixed length that hold several conversations each (`packed: true`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.bucketing import (
    Bucket,
    BucketPlan,
    Measures,
    Shape,
    least_padding_edges,
)
from speechlm2_jax.data.config import DataLoaderConfig, LoaderConfig
from speechlm2_jax.data.packed_members import Sums, packed_members
from speechlm2_jax.data.salm_contents import salm_shape
from speechlm2_jax.data.sampler import BatchPlan, Sampler

LOOKAHEAD = 64
"""Conversations that a batch may leave to the next one while it looks for some that fit."""


def packs(config: LoaderConfig) -> TypeGuard[DataLoaderConfig]:
    """Whether settings ask for packed rows."""
    return isinstance(config, DataLoaderConfig) and config.packed


def plan_packed(measures: Measures, config: DataLoaderConfig, multiple: int) -> BucketPlan:
    """Plans the shapes of packed rows: all have the same length.

    The length is `packed_tokens`; else `max_tokens`, or more if a conversation has more positions.
    What is longer has no bucket. Buckets are those of the longest clip of a conversation
    (`num_buckets`), or of lengths (`bucket_duration_bins`); without either there is one.
    """
    tokens = tokens_of_rows(config, int(measures.positions.max(initial=1)), multiple)
    edges = packed_edges(measures, config)
    bucket_of = np.where(
        measures.positions > tokens,
        -1,
        np.searchsorted(edges, bucketed(measures, config), side="left"),
    )
    present = sorted(set(bucket_of.tolist()) - {-1})
    sums = [Sums.of(measures.take(np.flatnonzero(bucket_of == index))) for index in present]
    members = packed_members(sums, config, tokens, multiple)
    places = np.searchsorted(present, bucket_of)
    return BucketPlan(
        buckets=tuple(
            Bucket(longest=one.longest, shape=salm_shape(one, config.sample_rate))
            for one in members
        ),
        bucket_of=np.where(bucket_of < 0, -1, places).astype(np.int64),
        members=members,
    )


def tokens_of_rows(config: DataLoaderConfig, longest: int, multiple: int) -> int:
    """LLM positions of a row, by those of the longest conversation."""
    tokens = config.packed_tokens or max(config.max_tokens or 0, longest)
    return -(-tokens // multiple) * multiple


def bucketed(measures: Measures, config: DataLoaderConfig) -> np.ndarray:
    """What the edges of buckets are compared with."""
    by_clips = config.bucket_duration_bins is None and config.use_bucketing
    return measures.samples if by_clips else measures.length


def packed_edges(measures: Measures, config: DataLoaderConfig) -> np.ndarray:
    """Upper ends of the buckets, rising; what is longer goes to one more bucket.

    `num_buckets` are those that leave the least padding of the longest clips.
    """
    if config.bucket_duration_bins is not None:
        return np.asarray(config.bucket_duration_bins, np.float64)
    if config.use_bucketing and len(measures):
        by_clips = replace(measures, length=measures.samples, positions=measures.samples * 0)
        return least_padding_edges(by_clips, config.sample_rate, 1, config.num_buckets)
    return np.zeros(0)


class Item(NamedTuple):
    """A conversation to be packed."""

    index: int
    positions: int
    clips: int


def items_of(
    index: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"], clips: Int[np.ndarray, " n"]
) -> list[Item]:
    """Conversations in order, by their indices, LLM positions and clips."""
    return list(map(Item, index.tolist(), positions.tolist(), clips.tolist()))


class PackedRows:
    """The rows of one batch while they are filled.

    Args:
        shape: of a group.
        groups: of a batch.
        least: LLM positions that every conversation has at least.
    """

    def __init__(self, shape: Shape, groups: int, least: int) -> None:
        self._shape, self._groups, self._least = shape, groups, least
        self._room = [shape.tokens] * (groups * shape.sequences)
        self._clips = [shape.clips] * groups
        self._open = 0
        """The first row with room for any conversation."""
        self.items: list[Item] = []
        self.places: list[int] = []
        """The row of each, counted over all groups."""
        self.is_full = False

    @property
    def indices(self) -> list[int]:
        """Those of what is in it, in order."""
        return [item.index for item in self.items]

    @property
    def has_room(self) -> bool:
        """Whether any conversation may fit."""
        room, least = self._room, self._least
        while self._open < len(room) and room[self._open] < least:
            self._open += 1
        return self._open < len(room)

    def add(self, item: Item) -> bool:
        """Takes a conversation if it fits: into the first such row of a group with clips left."""
        room, clips, per_group = self._room, self._clips, self._shape.sequences
        for place in range(self._open, len(room)):
            if room[place] >= item.positions and clips[place // per_group] >= item.clips:
                self._put(item, place)
                return True
        return False

    def add_evenly(self, item: Item) -> bool:
        """The same, into the emptiest row."""
        room, clips, per_group = self._room, self._clips, self._shape.sequences
        fitting = [p for p in range(len(room)) if clips[p // per_group] >= item.clips]
        place = max(fitting, key=room.__getitem__, default=0)  # the first of the emptiest
        if not fitting or room[place] < item.positions:
            return False
        self._put(item, place)
        return True

    def _put(self, item: Item, place: int) -> None:
        self._room[place] -= item.positions
        self._clips[place // self._shape.sequences] -= item.clips
        self.items.append(item)
        self.places.append(place)

    def spread(self) -> "PackedRows":
        """An incomplete batch over all rows of all groups, if clips allow."""
        if self.is_full:
            return self
        even = PackedRows(self._shape, self._groups, self._least)
        return even if all(map(even.add_evenly, self.items)) else self

    def by_group(self) -> list[list[tuple[int, int]]]:
        """Of each group, (index, row) of its conversations in order."""
        groups: list[list[tuple[int, int]]] = [[] for _ in range(self._groups)]
        for item, place in zip(self.items, self.places, strict=True):
            group, row = divmod(place, self._shape.sequences)
            groups[group].append((item.index, row))
        return groups


class Packed(NamedTuple):
    """A queue of conversations in batches."""

    batches: list[PackedRows]
    """They take no more of the queue."""
    rest: PackedRows
    """The last batch, which would."""
    waiting: list[Item]
    """Those that did not fit into it."""


def pack(
    queue: Iterable[Item], shape: Shape, groups: int, least: int, *, is_end: bool = True
) -> Packed:
    """Packs conversations in order, each into the first row with room for it.

    One that does not fit waits for the next batch, up to LOOKAHEAD of them. At the end of all
    (`is_end`) none is left waiting. Packing the rest and those waiting, in the order of the queue,
    before others goes on as if there had been no end.
    """
    batches, waiting, coming = list[PackedRows](), list[Item](), iter(queue)
    while True:
        batch, is_through = PackedRows(shape, groups, least), False
        waiting = [item for item in waiting if not batch.add(item)]
        while len(waiting) < LOOKAHEAD and batch.has_room:
            item = next(coming, None)
            if item is None:
                is_through = True
                break
            if not batch.add(item):
                waiting.append(item)
        if is_through and not (is_end and waiting):
            return Packed(batches, batch, waiting)
        batch.is_full = True
        batches.append(batch)


@dataclass(frozen=True, kw_only=True)
class PackedSampler(Sampler):
    """Plans batches of packed rows.

    Each conversation goes to the first row with room for it, of a group with clips left. One that
    does not fit waits for the next batch, up to LOOKAHEAD of them. So batches follow an order only
    within that distance.
    """

    def can_replace(self, index: int, other: int) -> bool:
        """Whether a conversation fits into the place of another in its row."""
        return bool(self.measures.positions[index] <= self.measures.positions[other])

    def with_fill(self) -> "PackedSampler":
        """Itself, with the share of each bucket's positions that is filled in epoch 0."""
        return replace(self, plan=filled(self.plan, self.epoch(0), self.measures.positions))

    def in_order(self, order: np.ndarray, *, is_end: bool) -> tuple[list[BatchPlan], list[int]]:
        """Packs in the order given, in the shape that holds all."""
        batches, rest = self._packed(len(self.plan.buckets) - 1, order)
        planned = [batch.planned() for batch in batches]
        if rest.is_full or is_end:
            return [*planned, *self._rest(rest)], []
        return planned, rest.indices

    def _by_bucket(self, order: np.ndarray) -> Iterator[BatchPlan]:
        bucket_of, left = self.plan.bucket_of[order], list[int]()
        last = int(bucket_of.max(initial=-1))
        for bucket in range(last + 1):
            own = np.asarray([*left, *order[bucket_of == bucket].tolist()], np.int64)
            batches, rest = self._packed(bucket, own)
            yield from (batch.planned() for batch in batches)
            left = rest.indices
            if bucket == last:
                yield from self._rest(rest)

    def _rest(self, batch: "PackedBatch") -> list[BatchPlan]:
        is_wanted = batch.indices and (batch.is_full or not self.drop_last)
        return [batch.planned()] if is_wanted else []

    def _packed(self, bucket: int, order: np.ndarray) -> "tuple[list[PackedBatch], PackedBatch]":
        """Batches that take no more of these, and the last one, which would."""
        if bucket < 0:  # nothing is planned at all
            return [], PackedBatch(bucket=bucket, filled=None)
        measures, plan = self.measures, self.plan
        items = items_of(order, measures.positions[order], measures.clips[order])
        least = plan.members[bucket].least_positions
        packed = pack(items, plan.buckets[bucket].shape, self.groups, least)
        batches = [PackedBatch(bucket=bucket, filled=rows) for rows in packed.batches]
        return batches, PackedBatch(bucket=bucket, filled=packed.rest)


@dataclass(kw_only=True)
class PackedBatch:
    """A batch of packed rows of a bucket."""

    bucket: int
    filled: PackedRows | None

    @property
    def indices(self) -> list[int]:
        """Its conversations, in order."""
        return self.filled.indices if self.filled else []

    @property
    def is_full(self) -> bool:
        """Whether it takes no more."""
        return self.filled is not None and self.filled.is_full

    def planned(self) -> BatchPlan:
        """The batch; an incomplete one is spread over all rows of all groups, if clips allow."""
        assert self.filled is not None
        pairs = self.filled.spread().by_group()
        return BatchPlan(
            bucket=self.bucket,
            groups=tuple(tuple(index for index, _ in group) for group in pairs),
            rows=tuple(tuple(row for _, row in group) for group in pairs),
        )


def filled(
    plan: BucketPlan, batches: Iterable[BatchPlan], positions: Int[np.ndarray, " N"]
) -> BucketPlan:
    """The plan, with the share of each bucket's positions that is filled in some batches."""
    real, room = np.zeros((2, len(plan.buckets)))
    for batch in batches:
        chosen = [index for group in batch.groups for index in group]
        shape = plan.buckets[batch.bucket].shape
        real[batch.bucket] += positions[chosen].sum(dtype=np.int64)
        room[batch.bucket] += len(batch.groups) * shape.sequences * shape.tokens
    return replace(plan, filled=tuple((real / np.maximum(room, 1)).tolist()))
