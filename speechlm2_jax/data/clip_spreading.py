"""Groups of as many conversations as a shape has sequences, none with more clips than it holds.

Where some conversations have many recordings and most have few, those with many are exchanged for
others of the same bucket, so that every group gets all its sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Real

from speechlm2_jax.data.bucketing import BucketPlan, Shape

_REACHES = (64, 4096)
"""Groups on each side among which a partner is looked for first; then among all."""
_TRIED = 32
"""Partners whose costs are looked at, of each reach."""
_AT_ONCE = 1 << 20
_FAILURES = 64
"""After so many groups without a partner no more are looked for."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The conversations of a bucket, group after group."""

    rows: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " groups"]
    """Where groups end in `rows`."""
    complete: int
    """Batches of so many groups that take no more; the groups after them are the rest."""
    per_batch: int

    @property
    def begin_of_rest(self) -> int:
        """The place in `rows` after the complete batches."""
        return int(self.ends[self.complete * self.per_batch - 1]) if self.complete else 0


def chunks(
    rows: Int[np.ndarray, " n"],
    clips: Int[np.ndarray, " n"] | None,
    shape: Shape,
    groups: int,
    *,
    leaves_light: bool = False,
    is_end: bool = False,
) -> Chunks:
    """Splits the conversations of a bucket into groups, and these into batches.

    Args:
        rows: in the order in which they are taken.
        clips: of each; None where no group can have too many.
        shape: of a group.
        groups: of a batch.
        leaves_light: whether those with the fewest clips are the rest, which a longer bucket takes.
            So its clips are the same in every epoch. Else the rest are the last ones.
        is_end: whether the rest makes a batch too.
    """
    per_batch = shape.sequences * groups
    complete = len(rows) // per_batch
    whole = complete * per_batch
    if clips is not None and leaves_light:
        heavy_first = np.argsort(-clips.astype(np.int64), kind="stable")
        moved = np.concatenate([np.sort(heavy_first[:whole]), np.sort(heavy_first[whole:])])
        rows, clips = rows[moved], clips[moved]
    if clips is not None:
        ends = np.arange(shape.sequences, whole + 1, shape.sequences)
        if is_end:
            sizes = [len(part) for part in np.array_split(rows[whole:], groups)]
            ends = np.concatenate([ends, whole + np.cumsum(sizes)])
        moved = spread(clips, ends, shape.clips)
        rows, clips = rows[moved], clips[moved]
        fits = _fits(clips[:whole].reshape(complete, groups, shape.sequences), shape)
        if not fits.all() and (is_end or not leaves_light):
            return _cut_short(rows, clips, shape, groups)
        if not fits.all():  # a longer bucket takes the others
            is_kept = np.repeat(fits, per_batch)
            moved = np.concatenate([np.flatnonzero(is_kept), np.flatnonzero(~is_kept)])
            rows = np.concatenate([rows[:whole][moved], rows[whole:]])
            clips = np.concatenate([clips[:whole][moved], clips[whole:]])
            complete = int(fits.sum())
            whole = complete * per_batch
    return Chunks(
        rows=rows,
        ends=np.concatenate(
            [
                np.arange(shape.sequences, whole + 1, shape.sequences),
                whole + group_ends(len(rows) - whole, _after(clips, whole), shape),
            ]
        ),
        complete=complete,
        per_batch=groups,
    )


def _fits(clips: Int[np.ndarray, "batches groups rows"], shape: Shape) -> Bool[np.ndarray, " n"]:
    """Which batches have no group with too many clips."""
    return (clips.sum(axis=2) <= shape.clips).all(axis=1)


def _cut_short(rows: np.ndarray, clips: np.ndarray, shape: Shape, groups: int) -> Chunks:
    """Groups that end where their clips do, though sequences are left."""
    ends = group_ends(len(rows), clips, shape)
    complete = max(len(ends) - 1, 0) // groups
    begin = int(ends[complete * groups - 1]) if complete else 0
    complete += len(rows) - begin == shape.sequences * groups
    return Chunks(rows=rows, ends=ends, complete=complete, per_batch=groups)


def group_ends(
    count: int, clips: Int[np.ndarray, " n"] | None, shape: Shape
) -> Int[np.ndarray, " groups"]:
    """Where groups end that take conversations in order, as many as sequences and clips allow."""
    if not count:
        return np.zeros(0, np.int64)
    if clips is None:
        ends = np.arange(shape.sequences, count + shape.sequences, shape.sequences)
        return np.minimum(ends, count)
    before = np.concatenate([[0], np.cumsum(clips, dtype=np.int64)])
    fitting = np.searchsorted(before, before[:-1] + shape.clips, side="right") - 1
    most = np.minimum(np.arange(count) + shape.sequences, fitting)
    after, found, place = np.minimum(most, count).tolist(), list[int](), 0
    while place < count:
        place = after[place]
        found.append(place)
    return np.asarray(found, np.int64)


def even_groups(
    groups: Sequence[np.ndarray], shape: Shape, count: int, clips: np.ndarray | None
) -> tuple[tuple[int, ...], ...]:
    """The groups of a batch; those of an incomplete one are made equal, if their clips allow.

    So no group has all the padding. `clips` are those of all conversations, None: without a limit.
    """
    rows = np.concatenate([*groups, np.zeros(0, np.int64)])
    if len(rows) < shape.sequences * count:
        even = np.array_split(rows, count)
        if clips is None or all(clips[group].sum() <= shape.clips for group in even):
            groups = even
    given = [tuple(group.tolist()) for group in groups]
    return (*given, *[()] * (count - len(given)))


def spread(
    clips: Int[np.ndarray, " n"],
    ends: Int[np.ndarray, " groups"],
    most: int,
    costs: Real[np.ndarray, " n"] | None = None,
    budget: float = 0.0,
) -> Int[np.ndarray, " n"]:
    """An order of conversations in which no group has more than `most` clips, where there is one.

    Conversations of a group with too many change places with those of the nearest group that can
    take them. With `most` at least the mean of a full group plus the clips of one conversation it
    always succeeds. Else some groups keep too many.

    Args:
        clips: of each conversation, group after group.
        ends: where the groups end; what is behind the last one stays where it is.
        most: clips of a group.
        costs: of each conversation; exchanges within the `budget` are preferred.
        budget: what the costs of a group may sum to, or its costliest times its size.
    """
    ends = np.unique(ends[ends > 0])
    order = np.arange(len(clips))
    if not len(ends) or _most(clips, ends) <= most:
        return order
    groups, failures = _Groups(clips, ends, most, costs, budget), 0
    for group in np.flatnonzero(groups.sums > most).tolist():
        while groups.sums[group] > most and groups.relieve(group):
            pass
        failures += bool(groups.sums[group] > most)
        if failures == _FAILURES:
            break
    return groups.order


def clips_by_bucket(
    clips: Int[np.ndarray, " N"], plan: BucketPlan
) -> Int[np.ndarray, "buckets clips"]:
    """How many conversations of each bucket have so many clips."""
    buckets, width = len(plan.buckets), int(clips.max(initial=0)) + 1
    counts = np.zeros(buckets * width, np.int64)
    for begin in range(0, len(clips), _AT_ONCE):
        bucket = np.asarray(plan.bucket_of[begin : begin + _AT_ONCE], np.int64)
        own = np.asarray(clips[begin : begin + _AT_ONCE], np.int64)
        places = (bucket * width + own)[bucket >= 0]
        counts += np.bincount(places, minlength=len(counts))
    return counts.reshape(buckets, width)


def _most(clips: np.ndarray, ends: np.ndarray) -> int:
    """The clips of the group that has most."""
    before = np.concatenate([[0], np.cumsum(clips, dtype=np.int64)])
    return int(np.diff(before[ends], prepend=0).max(initial=0))


def _after(clips: np.ndarray | None, begin: int) -> np.ndarray | None:
    return None if clips is None else clips[begin:]


class _Groups:
    """Groups whose conversations change places."""

    def __init__(
        self,
        clips: np.ndarray,
        ends: np.ndarray,
        most: int,
        costs: np.ndarray | None,
        budget: float,
    ) -> None:
        self.order = np.arange(len(clips))
        self._clips, self._most = clips.astype(np.int64), most
        self._begins, self._ends = np.concatenate([[0], ends[:-1]]), ends
        used = self._clips[: ends[-1]]
        self.sums = np.add.reduceat(used, self._begins)
        self._least = np.minimum.reduceat(used, self._begins)
        self._costs = None if costs is None else costs.astype(np.float64)
        self._budget = budget

    def relieve(self, group: int) -> bool:
        """Exchanges a conversation of a group for one with fewer clips; False: there is none."""
        begin, end = self._begins[group], self._ends[group]
        own = begin + np.argsort(-self._clips[begin:end], kind="stable")
        for is_bound in (True, False) if self._costs is not None else (False,):
            for reach in (*_REACHES, len(self.sums)):
                for place in own.tolist():
                    for other in self._partners(group, place, reach):
                        if not is_bound or self._is_within(group, place, *other):
                            self._exchange(group, place, *other)
                            return True
        return False

    def _partners(self, group: int, place: int, reach: int) -> Sequence[tuple[int, int]]:
        """Groups that can take the conversation at a place, nearest first, and what they give."""
        low, high = max(group - reach, 0), group + reach + 1
        sums, least, clips = self.sums[low:high], self._least[low:high], self._clips[place]
        can = (sums - least + clips <= self._most) & (least < clips)
        can[group - low] = False
        found = np.flatnonzero(can) + low
        nearest = found[np.argsort(np.abs(found - group), kind="stable")][:_TRIED].tolist()
        return [(other, self._lightest(other)) for other in nearest]

    def _lightest(self, group: int) -> int:
        begin = int(self._begins[group])
        return begin + int(self._clips[begin : self._ends[group]].argmin())

    def _is_within(self, group: int, place: int, other: int, other_place: int) -> bool:
        """Whether both groups keep their budget, or cost no more than before."""
        assert self._costs is not None
        change = self._costs[other_place] - self._costs[place]
        for one, at, more in ((group, place, change), (other, other_place, -change)):
            costs = self._costs[self._begins[one] : self._ends[one]].copy()
            before = costs.sum()
            costs[at - self._begins[one]] += more
            most = max(self._budget, before)
            if costs.sum() > most and len(costs) * costs.max() > self._budget:
                return False
        return True

    def _exchange(self, group: int, place: int, other: int, other_place: int) -> None:
        for values in (self.order, self._clips, self._costs):
            if values is not None:
                values[[place, other_place]] = values[[other_place, place]]
        for one in (group, other):
            own = self._clips[self._begins[one] : self._ends[one]]
            self.sums[one], self._least[one] = own.sum(), own.min()
