"""What one data-parallel group reads of a stream, and its shuffle buffer.

Events of all pools are numbered as they are read. The example of number n waits until its key,
n + a random number below the reach of the shuffle, has been passed. Of each bucket the one with the
lowest key comes first. So of each bucket one key tells which examples are in the buffer, and a
buffer is made again by reading from its oldest example on.
"""

import bisect
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.streams.events import Event, Fault, PoolReader, StreamPlace
from speechlm2_jax.data.streams.order import place_draws, source_draws
from speechlm2_jax.data.streams.plan import StreamSampler
from speechlm2_jax.settings import SettingsError

BUFFER_BYTES = 1 << 29
"""Of the recordings in the buffer of a group, at most so much and one more."""
MOST_OVERFULL = 4
"""Times the size of the buffer that wait at most, where a step needs examples that are not among
those at hand."""
MOST_USELESS = 200_000
"""Rows one after another of which none can be used."""
_AT_ONCE, _WAITING = 16, 64
_LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class ReadyEvent:
    """An event, its conversation with token ids."""

    event: Event
    what: Conversation | Fault | None
    """None: settings leave it out."""
    bucket: int = -1
    clips: int = 0
    left_out: str = ""
    """Why settings leave it out."""


Prepare = Callable[[Sequence[Event]], Sequence[ReadyEvent]]


@dataclass(kw_only=True, eq=False)
class StreamExample:
    """An example in the buffer."""

    number: int
    key: float
    bucket: int
    clips: int
    size: int
    """Bytes of its recordings."""
    conversation: Conversation
    source: str
    epoch: int
    places: tuple[StreamPlace, ...]
    """Of each pool, where reading resumes to read this one next."""
    drawn: int
    """Examples that were read before it, by which the pool is drawn."""
    future: "Future[Any] | None" = None
    """Reads it."""


class _PoolStream:
    """The events of a pool, made ready in a thread."""

    def __init__(self, reader: PoolReader, start: StreamPlace, prepare: Prepare) -> None:
        self.place = start
        """From which the next event comes."""
        self._reader, self._prepare = reader, prepare
        self._queue: queue.Queue[ReadyEvent | BaseException] = queue.Queue(_WAITING)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def take(self) -> ReadyEvent:
        """The next event. Raises what reading raised."""
        while not self._is_closed.is_set():
            try:
                found = self._queue.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if isinstance(found, BaseException):
                raise found
            place = found.event.place
            self.place = place._replace(taken=place.taken + 1)
            return found
        raise RuntimeError("the stream is closed")

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        self._reader.close()

    def _run(self) -> None:
        try:
            events = self._reader.events(self.place)
            while not self._is_closed.is_set():
                for ready in self._prepare(list(islice(events, _AT_ONCE))):
                    self._put(ready)
        except BaseException as error:  # noqa: BLE001  raised where the next event is taken
            self._put(error)

    def _put(self, found: "ReadyEvent | BaseException") -> None:
        while not self._is_closed.is_set():
            try:
                self._queue.put(found, timeout=_LOOK_S)
            except queue.Full:
                continue
            return


@dataclass(kw_only=True)
class _Buffer:
    """Examples that wait, by bucket."""

    queues: list[list[tuple[float, int]]]
    """Of each bucket (key, number), the lowest first."""
    items: dict[int, StreamExample] = field(default_factory=dict)
    """By number, the oldest first."""
    size: int = 0
    """Bytes."""

    def add(self, example: StreamExample) -> None:
        self.items[example.number] = example
        bisect.insort(self.queues[example.bucket], (example.key, example.number))
        self.size += example.size

    def first(self, bucket: int) -> StreamExample | None:
        own = self.queues[bucket]
        return self.items[own[0][1]] if own else None

    def pop(self, bucket: int) -> StreamExample:
        _, number = self.queues[bucket].pop(0)
        example = self.items.pop(number)
        self.size -= example.size
        return example


class GroupStream:
    """Reads a stream for one group.

    Args:
        sampler: the plan.
        group: which.
        prepare: makes events ready.
        state: of `get_state`; None: the start.
    """

    def __init__(
        self,
        sampler: StreamSampler,
        group: int,
        prepare: Prepare,
        state: "dict[str, Any] | None" = None,
    ) -> None:
        self._sampler, self._group = sampler, group
        self._buckets = len(sampler.limits)
        self._reach = sampler.buffer_size / 2 if sampler.shuffle else 0.0
        self._source, self._move = (
            source_draws(sampler.seed, group),
            place_draws(sampler.seed, group),
        )
        self._ends = np.cumsum([pool.share for pool in sampler.pools])
        self._buffer = _Buffer(queues=[[] for _ in range(self._buckets)])
        self._taken = [-1.0] * self._buckets
        self._number, self._drawn, self._useless = 0, 0, 0
        self.faults: list[tuple[Event, Fault, int]] = []
        """Met since they were last asked for, with the numbers of their events."""
        self.left_out: list[tuple[str, str, str]] = []
        """Source, cause and id of what settings leave out, in the first pass; likewise."""
        self._useful = [-1] * len(sampler.pools)
        """Of each pool, the pass of its last example that could be used, or its first one."""
        places = [StreamPlace(group)] * len(sampler.pools)
        if state is not None:
            places = [StreamPlace(*place) for place in state["places"]]
            self._number = int(state["number"])
            self._drawn = int(state.get("drawn", self._number))
        self._pools = [
            _PoolStream(PoolReader(pool, pool.order(sampler.groups)), place, prepare)
            for pool, place in zip(sampler.pools, places, strict=True)
        ]
        self._to_replay = state

    def replay(self) -> None:
        """Fills the buffer as it was at the state that was given."""
        state, self._to_replay = self._to_replay, None
        if state is None:
            return
        taken = [float(key) for key in state["taken"]]
        while self._number < int(state["read"]):
            self._read(taken)
        self._taken = taken
        self.faults.clear()
        self.left_out.clear()

    def get_state(self) -> dict[str, Any]:
        """Plain JSON values, as of the last example taken."""
        oldest = next(iter(self._buffer.items.values()), None)
        number = self._number if oldest is None else oldest.number
        places = self._places if oldest is None else oldest.places
        return {
            "read": self._number,
            "number": number,
            "drawn": self._drawn if oldest is None else oldest.drawn,
            "places": [list(place) for place in places],
            "taken": list(self._taken),
        }

    def next_example(self, bucket: int, clips: int) -> StreamExample | None:
        """Takes an example for a batch of a bucket with room for so many clips.

        None if there is none: the buffer is more than full of longer ones, or the clips are too
        many.
        """
        while self._ready(bucket) is None and not self.is_full:
            self._read(self._taken)
        while (found := self._shorter(bucket, clips)) is None and not self._is_overfull:
            self._read(self._taken)
        if found is None:
            return None
        self._taken[found.bucket] = found.key
        return self._buffer.pop(found.bucket)

    def upcoming(self, bucket: int, count: int) -> list[StreamExample]:
        """Those of a bucket that come next."""
        listed = self._buffer.queues[bucket][:count]
        return [self._buffer.items[number] for _, number in listed]

    @property
    def is_full(self) -> bool:
        """Whether no more examples are read before one is taken."""
        buffer = self._buffer
        return len(buffer.items) >= self._sampler.buffer_size or buffer.size >= BUFFER_BYTES

    @property
    def _is_overfull(self) -> bool:
        """Whether no more are read though nothing at hand fits."""
        buffer = self._buffer
        most = MOST_OVERFULL * self._sampler.buffer_size
        return len(buffer.items) >= most or buffer.size >= BUFFER_BYTES

    @property
    def waiting(self) -> int:
        """Examples in the buffer."""
        return len(self._buffer.items)

    def close(self) -> None:
        """Stops reading."""
        for pool in self._pools:
            pool.close()

    @property
    def _places(self) -> tuple[StreamPlace, ...]:
        return tuple(pool.place for pool in self._pools)

    def _shorter(self, bucket: int, clips: int) -> StreamExample | None:
        """The first of a bucket, or of the next shorter one that has any, with so many clips."""
        for shorter in range(bucket, -1, -1):
            found = self._ready(shorter)
            if found is not None and found.clips <= clips:
                return found
        return None

    def _ready(self, bucket: int) -> StreamExample | None:
        """The first of a bucket, if no example that is still to be read could come before it."""
        found = self._buffer.first(bucket)
        is_settled = found is not None and (self._reach == 0 or found.key < self._number)
        return found if is_settled else None

    def _count_useless(self, pool: int, ready: ReadyEvent) -> None:
        """Raises SettingsError where a pool has no example for this group: it would wait for ever.

        That is so if a whole pass over its shards gave none, or very many rows.
        """
        useful, epoch = self._useful[pool], ready.event.epoch
        if ready.bucket >= 0 or useful < 0:
            self._useful[pool] = epoch
        self._useless = 0 if ready.bucket >= 0 else self._useless + 1
        if self._useless > MOST_USELESS or 0 <= useful < epoch - 1:
            cause = ready.left_out or (
                ready.what.cause if isinstance(ready.what, Fault) else "filtered"
            )
            raise SettingsError(
                f"{ready.event.source}: no row can be used of {self._useless} that were read one "
                f"after another for group {self._group}; the last one: {cause}. Change the "
                "settings that leave them out, or remove the entry"
            )

    def _read(self, taken: Sequence[float]) -> None:
        """Reads an event; examples with keys up to those taken of their bucket are passed over.

        What cannot be used is followed by the next of the same pool, so that shares are those of
        the examples.
        """
        number, places, drawn = self._number, self._places, self._drawn
        pool = 0
        if len(self._pools) > 1:
            pool = int(np.searchsorted(self._ends[:-1], self._source(drawn), side="right"))
        ready = self._pools[pool].take()
        self._number += 1
        if isinstance(ready.what, Fault):
            self.faults.append((ready.event, ready.what, number))
        if ready.left_out and not ready.event.epoch:
            self.left_out.append((ready.event.source, ready.left_out, ready.event.what.id))
        self._drawn += ready.bucket >= 0
        self._count_useless(pool, ready)
        key = number + self._reach * self._move(number)
        if ready.bucket < 0 or key <= taken[ready.bucket]:
            return
        assert isinstance(ready.what, Conversation)
        example = StreamExample(
            number=number,
            key=key,
            bucket=ready.bucket,
            clips=ready.clips,
            size=sum(len(clip.data or b"") for clip in ready.what.clips),
            conversation=ready.what,
            source=ready.event.source,
            epoch=ready.event.epoch,
            places=places,
            drawn=drawn,
        )
        self._buffer.add(example)
