"""Packed rows of a large data set, window by window."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.index.windows import Carried, WindowPlan, WindowSampler, marked
from speechlm2_jax.data.packing import Packed, PackedRows, filled, items_of, pack
from speechlm2_jax.data.sampler import BATCHES, BatchPlan


@dataclass(frozen=True, kw_only=True)
class PackedWindowPlan(WindowPlan):
    """The batches of one window, several conversations in a row."""

    places: Int[np.ndarray, " n"]
    """Of each of `rows`, the row of its group that it is in."""

    def __getitem__(self, number: int) -> BatchPlan:
        bucket, first, end = self.batches[number].tolist()
        begin = int(self.ends[first - 1]) if first else 0
        bounds, part = self.ends[first : end - 1] - begin, slice(begin, int(self.ends[end - 1]))
        groups, rows = np.split(self.rows[part], bounds), np.split(self.places[part], bounds)
        return BatchPlan(
            bucket=bucket,
            groups=tuple(tuple(group.tolist()) for group in groups),
            rows=tuple(tuple(own.tolist()) for own in rows),
        )


@dataclass(frozen=True, kw_only=True)
class PackedWindowSampler(WindowSampler):
    """Plans packed rows of a large data set.

    What a window leaves goes on in the next one, with those that wait. So batches in order are
    those of `PackedSampler`, whatever the windows.
    """

    def can_replace(self, index: int, other: int) -> bool:
        """Whether a conversation fits into the place of another in its row."""
        assert self.positions is not None
        return bool(self.positions[index] <= self.positions[other])

    def with_fill(self) -> "PackedWindowSampler":
        """Itself, with the share of each bucket's positions that is filled in the first window."""
        assert self.positions is not None
        plan = filled(self.plan, self.window(0, 0, self.nothing), self.positions)
        return replace(self, plan=plan)

    def window(self, epoch: int, number: int, carried: Carried) -> PackedWindowPlan:
        """The batches of a window after what the one before it left."""
        rows, is_last = self.order.window(epoch, number), number + 1 == self.order.windows
        parts = self._by_bucket(rows) if self.by_bucket else [rows]
        first = 0 if self.by_bucket else len(self.plan.buckets) - 1
        most = max((b for b, own in enumerate(parts) if len(carried.rows[b]) + len(own)), default=0)
        built, left = _Built(self.groups), list[np.ndarray]()
        moved, marks = rows[:0], list[str | None]()
        for number_of, own in enumerate(parts):
            queue = np.concatenate([carried.rows[number_of], moved, own])
            packed = self._pack(first + number_of, queue, is_end=is_last)
            built.add(first + number_of, queue, packed.batches)
            places = np.asarray(sorted(i.index for i in (*packed.rest.items, *packed.waiting)), int)
            moved = queue[places] if is_last and self.by_bucket and number_of < most else rows[:0]
            is_end = is_last and (self.by_bucket or not self.endless)
            if is_end and number_of == most and len(places) and not self.drop_last:
                built.add(first + number_of, queue, [packed.rest.spread()])
            places = places[:0] if is_end else places
            left.append(queue[places])
            marks.append(_mark(places, len(queue), len(own)))
        carried = Carried(rows=tuple(left), is_tail=(False,) * len(left), marks=tuple(marks))
        generator = np.random.default_rng([self.seed, BATCHES, epoch, number])
        return built.finished(self, carried, generator if self.by_bucket else None)

    def _pack(self, bucket: int, queue: np.ndarray, *, is_end: bool) -> Packed:
        """Packs rows; items have their places in the queue."""
        assert self.positions is not None and self.clips is not None
        items = items_of(np.arange(len(queue)), self.positions[queue], self.clips[queue])
        shape, least = self.plan.buckets[bucket].shape, self.plan.members[bucket].least_positions
        return pack(items, shape, self.groups, least, is_end=is_end)


def _mark(places: np.ndarray, total: int, own: int) -> str | None:
    """Which rows of a window those at places of a queue are, whose last `own` are the window's.

    None where not all are of this window.
    """
    if not len(places) or places[0] < total - own:
        return None
    is_left = np.zeros(total - int(places[0]), bool)
    is_left[places - places[0]] = True
    return marked(is_left)


class _Built:
    """Batches of one window, as arrays."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._rows: list[np.ndarray] = []
        self._places: list[int] = []
        self._ends: list[int] = []
        self._buckets: list[int] = []

    def add(self, bucket: int, queue: np.ndarray, batches: Iterable[PackedRows]) -> None:
        """Adds batches of a bucket, whose items have their places in a queue."""
        chosen: list[int] = []
        for batch in batches:
            self._buckets.append(bucket)
            for group in batch.by_group():
                chosen += [place for place, _ in group]
                self._places += [row for _, row in group]
                self._ends.append(len(self._places))
        self._rows.append(queue[chosen])

    def finished(
        self,
        sampler: PackedWindowSampler,
        carried: Carried,
        generator: np.random.Generator | None,
    ) -> PackedWindowPlan:
        """The plan; its batches in an order that is drawn, if there is a generator."""
        first = np.arange(len(self._buckets)) * self._groups
        buckets = np.asarray(self._buckets, np.int64)
        batches = np.stack([buckets, first, first + self._groups], axis=1)
        return PackedWindowPlan(
            rows=np.concatenate([*self._rows, np.zeros(0, np.int64)]),
            places=np.asarray(self._places, np.int64),
            ends=np.asarray(self._ends, np.int64),
            batches=batches[generator.permutation(len(batches))] if generator else batches,
            sampler=sampler,
            carried=carried,
        )
