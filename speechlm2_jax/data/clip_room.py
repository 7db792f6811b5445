"""Enough clips in every shape that its batches are full."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.bucketing import BucketPlan

GROWTH = 1.25
"""By so much the clips of a shape grow until its batches are full."""


class _Planner(Protocol):
    """A Sampler or a WindowSampler."""

    @property
    def plan(self) -> BucketPlan:
        """Its buckets."""
        ...

    @property
    def groups(self) -> int:
        """Of a batch."""
        ...

    def clips_by_bucket(self) -> Int[np.ndarray, "buckets clips"] | None:
        """How many conversations of each bucket have so many clips.

        None where batches mix buckets, or where epochs differ.
        """
        ...

    def first_buckets(self) -> Int[np.ndarray, " batches"]:
        """The bucket of each of its first batches."""
        ...


P = TypeVar("P", bound=_Planner)


def with_room(sampler: P) -> P:
    """The sampler, with so many clips in its shapes that they end none of its first batches.

    Shapes are planned for the mean of their conversations. Conversations of many recordings may
    come together all the same, as in a manifest that is sorted. Shapes with the clips of as many
    of the largest conversations as they have sequences always have room.
    """
    most = [members.rows * members.most_clips_up_to for members in sampler.plan.members]
    clips = [bucket.shape.clips for bucket in sampler.plan.buckets]
    if all(own >= enough for own, enough in zip(clips, most, strict=True)):
        return sampler
    counts = sampler.clips_by_bucket()
    if counts is not None:
        needed = _needed(counts, sampler.plan, sampler.groups)
        clips = np.maximum(clips, np.minimum(needed, most)).tolist()
    wanted = _counts(_with_clips(sampler, np.maximum(clips, most).tolist()))
    while True:
        short = np.flatnonzero(_counts(_with_clips(sampler, clips)) != wanted).tolist()
        if not short:
            return _with_clips(sampler, clips)
        growing = [b for b in short if clips[b] < most[b]] or range(len(clips))
        for bucket in growing:
            grown = min(math.ceil(clips[bucket] * GROWTH), most[bucket])
            clips[bucket] = max(clips[bucket], grown)


def _needed(
    counts: Int[np.ndarray, "buckets clips"], plan: BucketPlan, groups: int
) -> Int[np.ndarray, " buckets"]:
    """Clips with which conversations of each bucket can always be spread over its groups.

    Those are the clips of a group on average and of one conversation more (`clip_spreading`), but
    not more than the largest conversations of a group have. What a bucket leaves has the fewest.
    """
    needed, left = np.zeros(len(counts), np.int64), np.zeros_like(counts[0])
    last = int(np.flatnonzero(counts.sum(axis=1)).max(initial=0))
    each = np.arange(len(left))
    for number, bucket in enumerate(plan.buckets[: last + 1]):
        own, rows = counts[number] + left, bucket.shape.sequences
        rest = int(own.sum()) % (rows * groups)
        left = np.diff(np.minimum(np.cumsum(own), rest), prepend=0)
        of_groups = (own.sum() - rest) // rows
        if number == last:
            of_groups += min(groups, rest)
        else:
            own = own - left
        if of_groups:
            largest = np.diff(np.minimum(np.cumsum(own[::-1]), rows), prepend=0)[::-1]
            usual = -(-int(own @ each) // int(of_groups)) + int(np.flatnonzero(own).max())
            needed[number] = min(usual, int(largest @ each))
    return needed


def _counts(sampler: _Planner) -> Int[np.ndarray, " buckets"]:
    return np.bincount(sampler.first_buckets(), minlength=len(sampler.plan.buckets))


def _with_clips(sampler: P, clips: Sequence[int]) -> P:
    """The same with other clips in the shapes of its buckets."""
    buckets = list(sampler.plan.buckets)
    for number, (bucket, count) in enumerate(zip(buckets, clips, strict=True)):
        shape: Any = bucket.shape
        if count != shape.clips:
            buckets[number] = replace(bucket, shape=replace(shape, clips=count))
    changed: Any = sampler
    return replace(changed, plan=replace(sampler.plan, buckets=tuple(buckets)))
