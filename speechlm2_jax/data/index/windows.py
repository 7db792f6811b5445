"""Which rows of a large data set make which batch, window by window."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Real

from speechlm2_jax.data.bucketing import BucketPlan, Measures
from speechlm2_jax.data.clip_spreading import chunks, clips_by_bucket, even_groups
from speechlm2_jax.data.index.order import Order
from speechlm2_jax.data.sampler import BATCHES, BatchPlan, Sampler

WINDOW_ROWS = 1 << 20
IN_ORDER_ROWS = 1 << 17
"""Of a window whose batches follow the order of the rows, which are filled one by one."""
Left = list[int | str | list[int]]
"""What a window leaves to the next, in a data state: of each bucket (one, if batches follow the
order) how many of the last rows of the window, or these marked (`marked`), or the rows."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a window leaves to the next."""

    rows: tuple[Int[np.ndarray, " n"], ...]
    """Of each bucket, or of the order (one array)."""
    is_tail: tuple[bool, ...]
    """Whether these are the last rows that the window itself has of the bucket."""
    marks: tuple[str | None, ...] = ()
    """Of each bucket, which of the last rows of the window these are, where they are some."""

    def left(self) -> Left:
        """The same for a data state, where a number stands for the last rows of a window."""
        marks = self.marks or (None,) * len(self.rows)
        triples = zip(self.rows, self.is_tail, marks, strict=True)
        return [
            mark or (len(rows) if is_tail else rows.tolist()) for rows, is_tail, mark in triples
        ]


def marked(is_left: Bool[np.ndarray, " n"]) -> str:
    """Some of the last rows of a window as a text: how many there are, and a bit for each."""
    return f"{len(is_left)}:{np.packbits(is_left).tobytes().hex()}"


def _of_marks(mark: str, rows: np.ndarray) -> np.ndarray:
    """The rows that a text of `marked` stands for, of those of a window."""
    count, _, bits = mark.partition(":")
    n = min(int(count), len(rows))
    is_left = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[:n]
    return rows[len(rows) - n :][is_left.astype(bool)]


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """The batches of one window (a sequence of BatchPlan)."""

    rows: Int[np.ndarray, " n"]
    """Batch after batch, before these are shuffled."""
    ends: Int[np.ndarray, " groups"]
    """Where the groups end in `rows`."""
    batches: Int[np.ndarray, "batches 3"]
    """Of each batch, in order: its bucket, its first group, and the group after its last."""
    sampler: "WindowSampler"
    carried: Carried
    """Left to the next window."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchPlan]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> BatchPlan:
        bucket, first, end = self.batches[number].tolist()
        begin = int(self.ends[first - 1]) if first else 0
        groups = np.split(self.rows[begin : self.ends[end - 1]], self.ends[first : end - 1] - begin)
        return self.sampler.batch(bucket, groups)


@dataclass(frozen=True, kw_only=True)
class WindowSampler:
    """Plans a large data set, of which one window at a time is in memory.

    In an epoch every row comes once, or as often as its source's share asks for. A window leaves
    incomplete batches to the next one; at the end of an epoch what is left of a bucket moves up
    into the next longer one, so that at most one batch is incomplete.
    """

    plan: BucketPlan
    """Its `bucket_of` may be mapped from a file; every row has a bucket."""
    clips: Int[np.ndarray, " N"] | None = None
    """Recordings of each row; None where no group of a bucket can have too many."""
    order: Order
    groups: int = 1
    by_bucket: bool = False
    """Batches of one bucket each, in random order; else in the order of the rows."""
    drop_last: bool = False
    endless: bool = False
    """Whether batches in order are filled across the end of an epoch."""
    positions: Int[np.ndarray, " N"] | None = None
    """LLM positions of each row, where several share one (`packed`)."""
    lengths: Int[np.ndarray, " N"] | None = None
    """Of each row, where batches in order are filled up to a sum of costs."""
    budget: float | None = None
    """What the costs of a group may sum to (`Sampler`)."""
    cost: Callable[[Real[np.ndarray, " n"]], Real[np.ndarray, " n"]] | None = None
    """What lengths count against the budget."""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.order.seed

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source; their indices follow one another."""
        return self.order.sizes

    def clips_of(self, index: int) -> int:
        """Recordings of a row; 0 where no group can have too many."""
        return 0 if self.clips is None else int(self.clips[index])

    def can_replace(self, index: int, other: int) -> bool:
        """Whether a conversation of the same bucket or a shorter one fits another's place."""
        return True

    @property
    def shard_seeds(self) -> tuple[int, ...]:
        """Of the order of the shards of each source."""
        return self.order.shard_seeds

    @property
    def nothing(self) -> Carried:
        """What is left to the first window of a run."""
        count = len(self.plan.buckets) if self.by_bucket else 1
        return Carried(rows=(np.zeros(0, np.int64),) * count, is_tail=(True,) * count)

    def clips_by_bucket(self) -> Int[np.ndarray, "buckets clips"] | None:
        """How many rows of each bucket have so many clips, where every row comes once an epoch."""
        if self.clips is None or not self.by_bucket or self.order.shares is not None:
            return None
        return clips_by_bucket(self.clips, self.plan)

    def first_buckets(self) -> Int[np.ndarray, " batches"]:
        """The bucket of each batch of the first window, and of that with most clips after another.

        Shuffled windows are alike.
        """
        windows, clips = {0}, self.clips
        if clips is not None and not self.order.shuffle:
            rows = (self.order.window(0, number) for number in range(self.order.windows))
            most = int(np.argmax([clips[own].mean() if len(own) else 0 for own in rows]))
            windows |= {max(most - 1, 0), most}
        found, carried = list[np.ndarray](), self.nothing
        for number in sorted(windows):
            plan = self.window(0, number, carried if number - 1 in windows else self.nothing)
            found.append(plan.batches[:, 0])
            carried = plan.carried
        return np.concatenate(found)

    def first_rows(self) -> Int[np.ndarray, " n"]:
        """The rows of the batches of the first window of a run."""
        return self.window(0, 0, self.nothing).rows

    def batches_per_pass(self) -> tuple[int, bool]:
        """The batches of an epoch, and whether they are estimated from those of a window."""
        plan, total = self.window(0, 0, self.nothing), self.order.total
        if self.order.windows == 1:
            return len(plan), False
        return max(round(len(plan) * total / max(len(plan.rows), 1)), 1), True

    def window(self, epoch: int, number: int, carried: Carried) -> WindowPlan:
        """The batches of a window after what the one before it left."""
        rows, is_last = self.order.window(epoch, number), number + 1 == self.order.windows
        if not self.by_bucket:
            return self._in_order(rows, carried.rows[0], is_last=is_last)
        filled, parts = _Filled(self), self._by_bucket(rows)
        most = max((b for b, own in enumerate(parts) if len(carried.rows[b]) + len(own)), default=0)
        moved, left, is_tail = rows[:0], list[np.ndarray](), list[bool]()
        for bucket, own in enumerate(parts):
            is_end = is_last and bucket == most
            queue = np.concatenate([carried.rows[bucket], moved, own])
            moved = filled.add(bucket, queue, is_last=is_last, is_end=is_end)
            is_tail.append(np.array_equal(moved, own[max(len(own) - len(moved), 0) :]))
            stays = not is_last and (is_tail[-1] or bucket + 1 == len(parts))
            left.append(moved if stays else moved[:0])
            if stays or is_end:
                moved = moved[:0]
        generator = np.random.default_rng([self.order.seed, BATCHES, epoch, number])
        carried = Carried(rows=tuple(left), is_tail=tuple(is_tail))
        return filled.finished(generator, carried)

    def carried(self, left: Left, epoch: int, number: int) -> Carried:
        """What the window before this one left to it, of a data state."""
        is_tail = tuple(isinstance(part, int) for part in left)
        marks = tuple(part if isinstance(part, str) else None for part in left)
        if not any(part for part in left if not isinstance(part, list)):
            tails = self.nothing.rows
        elif number:
            tails = self._tails(epoch, number - 1)
        else:
            tails = self._tails(epoch - 1, self.order.windows - 1)
        rows = tuple(
            tail[len(tail) - part :]
            if isinstance(part, int)
            else _of_marks(part, tail)
            if isinstance(part, str)
            else np.asarray(part, np.int64)
            for part, tail in zip(left, tails, strict=True)
        )
        return Carried(rows=rows, is_tail=is_tail, marks=marks)

    def batch(self, bucket: int, groups: Sequence[np.ndarray]) -> BatchPlan:
        """A global batch; an incomplete one is split evenly, so that no group has all padding."""
        shape = self.plan.buckets[bucket].shape
        return BatchPlan(bucket=bucket, groups=even_groups(groups, shape, self.groups, self.clips))

    def _by_bucket(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of each bucket, in order."""
        bucket = self.plan.bucket_of[rows]
        counts = np.bincount(bucket, minlength=len(self.plan.buckets))
        return np.split(rows[np.argsort(bucket, kind="stable")], np.cumsum(counts)[:-1])

    def _tails(self, epoch: int, number: int) -> tuple[np.ndarray, ...]:
        """The rows of a window, of which the last may be left to the next one."""
        rows = self.order.window(epoch, number)
        return tuple(self._by_bucket(rows)) if self.by_bucket else (rows,)

    def _in_order(self, own: np.ndarray, carried: np.ndarray, *, is_last: bool) -> WindowPlan:
        """Fills batches in the order given, by the sampler of small data."""
        rows = np.concatenate([carried, own])
        is_end = is_last and not self.endless
        batches, rest = self._sampler(rows).in_order(np.arange(len(rows)), is_end=is_end)
        left = len(rest)
        groups = [group for batch in batches for group in batch.groups]
        chosen = np.asarray([i for group in groups for i in group], np.int64)
        first = np.arange(len(batches)) * self.groups
        buckets = np.asarray([batch.bucket for batch in batches], np.int64)
        return WindowPlan(
            rows=rows[chosen],
            ends=np.cumsum([len(group) for group in groups], dtype=np.int64),
            batches=np.stack([buckets, first, first + self.groups], axis=1),
            sampler=self,
            carried=Carried(rows=(rows[len(rows) - left :],), is_tail=(left <= len(own),)),
        )

    def _sampler(self, rows: np.ndarray) -> Sampler:
        """One of small data, which has these rows and counts them from 0."""
        ones = np.ones(len(rows), np.int64)
        # of texts alone a shape has a clip all the same
        clips = ones * 0 if self.clips is None else np.asarray(self.clips[rows], np.int64)
        bucket_of = np.asarray(self.plan.bucket_of[rows], np.int64)
        costs = None
        if self.lengths is not None and self.cost is not None:
            costs = self.cost(np.asarray(self.lengths[rows], np.int64))
        return Sampler(
            plan=BucketPlan(buckets=self.plan.buckets, bucket_of=bucket_of),
            measures=Measures(length=ones, positions=ones, clips=clips, samples=ones),
            sizes=(len(rows),),
            groups=self.groups,
            drop_last=self.drop_last,
            budget=self.budget,
            costs=costs,
        )


class _Filled:
    """Batches of one window, bucket after bucket."""

    def __init__(self, sampler: WindowSampler) -> None:
        self._sampler = sampler
        self._rows: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._count = self._groups = 0
        self._batches: list[np.ndarray] = []

    def add(self, bucket: int, rows: np.ndarray, *, is_last: bool, is_end: bool) -> np.ndarray:
        """Fills as many batches of a bucket as rows allow; gives the rest.

        At the end of an epoch the rest is a batch too. In its last window any rows may be the rest.
        """
        sampler = self._sampler
        shape, per_batch = sampler.plan.buckets[bucket].shape, sampler.groups
        clips = None if sampler.clips is None else np.asarray(sampler.clips[rows], np.int64)
        found = chunks(rows, clips, shape, per_batch, leaves_light=is_last, is_end=is_end)
        takes_rest = is_end and not sampler.drop_last
        begin = len(rows) if takes_rest else found.begin_of_rest
        count = len(found.ends) if takes_rest else found.complete * per_batch
        self._take(bucket, found.rows[:begin], found.ends[:count])
        return found.rows[begin:]

    def finished(self, generator: np.random.Generator, carried: Carried) -> WindowPlan:
        """The plan, its batches in an order that is drawn."""
        nothing = np.zeros(0, np.int64)
        batches = np.concatenate([*self._batches, nothing.reshape(0, 3)])
        return WindowPlan(
            rows=np.concatenate([*self._rows, nothing]),
            ends=np.concatenate([*self._ends, nothing]),
            batches=batches[generator.permutation(len(batches))],
            sampler=self._sampler,
            carried=carried,
        )

    def _take(self, bucket: int, rows: np.ndarray, ends: np.ndarray) -> None:
        first = np.arange(0, len(ends), self._sampler.groups) + self._groups
        end = np.minimum(first + self._sampler.groups, len(ends) + self._groups)
        self._batches.append(np.stack([np.full_like(first, bucket), first, end], axis=1))
        self._rows.append(rows)
        self._ends.append(ends + self._count)
        self._count += len(rows)
        self._groups += len(ends)
