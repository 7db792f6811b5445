"""Packing: rows of a fixed length that hold several conversations each (`packed: true`)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from speechlm2_jax.data.bucketing import (
    Bucket,
    BucketPlan,
    Measures,
    Members,
    equal_mass_edges,
    rows_of,
)
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.salm_contents import CLIP_SPREAD, salm_shape
from speechlm2_jax.data.sampler import BatchPlan, Sampler

LOOKAHEAD = 64
"""Conversations that a batch may leave to the next one while it looks for some that fit."""


def plan_packed(measures: Measures, config: DataLoaderConfig, multiple: int) -> BucketPlan:
    """Plans the shapes of packed rows: all have the same length.

    The length is `packed_tokens`; else `max_tokens`, or more if a conversation has more positions.
    What is longer has no bucket. Buckets are those of the longest clip of a conversation
    (`num_buckets`), or of lengths (`bucket_duration_bins`); without either there is one.
    """
    longest = int(measures.positions.max(initial=1))
    tokens = config.packed_tokens or max(config.max_tokens or 0, longest)
    tokens = -(-tokens // multiple) * multiple
    values, edges = _bucketed(measures, config)
    bucket_of = np.where(
        measures.positions > tokens, -1, np.searchsorted(edges, values, side="left")
    )
    present = sorted(set(bucket_of.tolist()) - {-1})
    members, buckets = list[Members](), list[Bucket]()
    for index in present:
        own = measures.take(np.flatnonzero(bucket_of == index))
        up_to = measures.take(np.flatnonzero((bucket_of >= 0) & (bucket_of <= index)))
        one = Members(
            count=len(own),
            longest=own.length.max().item(),
            filled=int(own.positions.sum()),
            clips_mean=float(own.clips.mean()),
            clips_std=float(own.clips.std()),
            most_clips=int(own.clips.max()),
            most_clips_up_to=int(up_to.clips.max()),
            positions_up_to=tokens,
            samples_up_to=int(up_to.samples.max()),
            rows=rows_of(tokens, index, config),
            multiple=multiple,
        )
        shape = salm_shape(one, config.sample_rate)
        clips = max(_clips(own, one.rows * tokens), one.most_clips_up_to, 1)
        members.append(one)
        buckets.append(Bucket(longest=one.longest, shape=replace(shape, clips=clips)))
    places = np.searchsorted(present, bucket_of)
    return BucketPlan(
        buckets=tuple(buckets),
        bucket_of=np.where(bucket_of < 0, -1, places).astype(np.int64),
        members=tuple(members),
    )


def _bucketed(measures: Measures, config: DataLoaderConfig) -> tuple[np.ndarray, np.ndarray]:
    """What buckets are made by, and their upper ends."""
    if config.bucket_duration_bins is not None:
        return measures.length, np.asarray(config.bucket_duration_bins, np.float64)
    if config.use_bucketing:
        return measures.samples, equal_mass_edges(measures.samples, config.num_buckets)
    return measures.length, np.zeros(0)


def _clips(measures: Measures, room: int) -> int:
    """Clips of so many positions: the mean, and CLIP_SPREAD standard deviations.

    The variance is that of a renewal-reward process: conversations until the positions are full.
    """
    per_position = measures.clips.sum() / max(measures.positions.sum(), 1)
    deviation = (measures.clips - per_position * measures.positions).std()
    spread = math.sqrt(room / max(measures.positions.mean(), 1)) * deviation
    usual = math.ceil(room * per_position + CLIP_SPREAD * spread)
    return min(usual, int(measures.clips.sum()))


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

    def filled(self) -> tuple[float, ...]:
        """Of each bucket: the share of its LLM positions that conversations take in epoch 0."""
        real, room = np.zeros((2, len(self.plan.buckets)))
        for batch in self.epoch(0):
            chosen = [index for group in batch.groups for index in group]
            shape = self.plan.buckets[batch.bucket].shape
            real[batch.bucket] += self.measures.positions[chosen].sum()
            room[batch.bucket] += self.groups * shape.sequences * shape.tokens
        return tuple((real / np.maximum(room, 1)).tolist())

    def in_order(self, order: np.ndarray) -> "tuple[list[BatchPlan], PackedRows]":
        """Packs in the order given, in the shape that holds all."""
        batches, rest = self._packed(len(self.plan.buckets) - 1, order.tolist())
        return [batch.planned() for batch in batches], rest

    def _by_bucket(self, order: np.ndarray) -> Iterator[BatchPlan]:
        bucket_of, left = self.plan.bucket_of[order], list[int]()
        last = int(bucket_of.max(initial=-1))
        for bucket in range(last + 1):
            own = order[bucket_of == bucket].tolist()
            batches, rest = self._packed(bucket, [*left, *own])
            yield from (batch.planned() for batch in batches)
            left = rest.indices
            if bucket == last:
                yield from self._rest(rest)

    def _packed(self, bucket: int, queue: Sequence[int]) -> "tuple[list[PackedRows], PackedRows]":
        """Batches that take no more of these, and the last one, which would."""
        least = int(self.measures.positions[list(queue)].min(initial=1 << 30))
        complete, waiting, coming = list[PackedRows](), list[int](), iter(queue)
        is_through = False
        while True:
            batch = PackedRows.empty(self, bucket)
            waiting = [index for index in waiting if not batch.add(index)]
            while not is_through and len(waiting) < LOOKAHEAD and batch.most_room >= least:
                index = next(coming, None)
                if index is None:
                    is_through = True
                elif not batch.add(index):
                    waiting.append(index)
            if is_through and not waiting:
                return complete, batch
            batch.is_full = True
            complete.append(batch)


@dataclass(kw_only=True)
class PackedRows:
    """The rows of one batch while they are filled."""

    sampler: PackedSampler
    bucket: int
    room: np.ndarray
    """Positions left [groups, rows]."""
    clips: np.ndarray
    """Clips left [groups]."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """The group and the row of each of `indices`."""
    indices: list[int] = field(default_factory=list)
    is_full: bool = False

    @classmethod
    def empty(cls, sampler: PackedSampler, bucket: int) -> "PackedRows":
        """The rows of a bucket without anything in them."""
        shape = sampler.plan.buckets[bucket].shape if sampler.plan.buckets else None
        sizes = (shape.sequences, shape.tokens, shape.clips) if shape else (0, 0, 0)
        return cls(
            sampler=sampler,
            bucket=bucket,
            room=np.full((sampler.groups, sizes[0]), sizes[1]),
            clips=np.full(sampler.groups, sizes[2]),
        )

    @property
    def most_room(self) -> int:
        """Of any row."""
        return int(self.room.max(initial=0))

    def add(self, index: int, *, evenly: bool = False) -> bool:
        """Takes a conversation if it fits: into the first such row, or (`evenly`) the emptiest."""
        positions = int(self.sampler.measures.positions[index])
        clips = int(self.sampler.measures.clips[index])
        room = np.where((self.clips >= clips)[:, None], self.room, -1)
        place = int(room.argmax() if evenly else (room >= positions).argmax())
        group, row = divmod(place, room.shape[1])
        if room[group, row] < positions:
            return False
        self.room[group, row] -= positions
        self.clips[group] -= clips
        self.places.append((group, row))
        self.indices.append(index)
        return True

    def planned(self) -> BatchPlan:
        """The batch; an incomplete one is spread over all rows of all groups, if clips allow."""
        if not self.is_full:
            even = PackedRows.empty(self.sampler, self.bucket)
            if all(even.add(index, evenly=True) for index in self.indices):
                self.places = even.places
        groups: list[list[int]] = [[] for _ in self.clips]
        rows: list[list[int]] = [[] for _ in self.clips]
        for index, (group, row) in zip(self.indices, self.places, strict=True):
            groups[group].append(int(index))
            rows[group].append(row)
        return BatchPlan(
            bucket=self.bucket, groups=tuple(map(tuple, groups)), rows=tuple(map(tuple, rows))
        )
