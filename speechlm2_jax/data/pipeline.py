"""The loading pipeline, in Grain: the planner's positions, mapped to batches ahead of time.

    Positions -> map(read) -> to_iter_dataset(threads) [-> mp_prefetch(processes)]

The planner decides which conversations make which batch of which shape. Grain decides when and
where they are read: in threads, and with `worker_processes` in processes too.
"""

import logging
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grain

from speechlm2_jax.batches import HostBatch
from speechlm2_jax.data import worker_process
from speechlm2_jax.data.faults import Failure
from speechlm2_jax.data.reading import Key, Reading

BATCHES_AHEAD = 2
"""For each thread, so many batches are read or wait."""
Read = tuple[HostBatch, Reading]


class Plans(Protocol):
    """The batch plans of one set in order (`PlannedBatches`, `PlannedWindows`, `FusedPlans`)."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """After the plan last given: `epoch`, `position` and what else it needs."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a state."""
        ...


class Reader(Protocol):
    """Reads planned batches (`BatchReader`, `FusedReader`)."""

    def load(self, planned: Any, key: Key, /) -> Read:
        """Reads one. The key is its epoch, and its number in it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What reads ahead."""

    threads: int = 1
    """Of each process, and of this one if there are no others."""
    processes: int = 0
    """0: threads of this process read."""

    @property
    def buffered(self) -> int:
        """Batches that one process reads or keeps."""
        return BATCHES_AHEAD * max(self.threads, 1)


@dataclass(frozen=True, kw_only=True)
class Position:
    """One place in the order of batches."""

    plan: Any
    """None: the place after the last batch."""
    state: dict[str, Any]
    """That of the plans after this one."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A batch with all that the run must know of its reading."""

    batch: HostBatch | None
    """None after the last one."""
    state: dict[str, Any]
    """That of the plans after it."""
    read: Counter[str]
    """Source -> conversations whose turn came."""
    failures: Sequence[Failure]
    log: Sequence[logging.LogRecord] = ()
    """What was logged in another process."""

    @property
    def place(self) -> tuple[int, int]:
        """The epoch of the batch and its number, counted from 1."""
        return place_of(self.state)


def place_of(state: dict[str, Any]) -> tuple[int, int]:
    """The epoch of a batch and its number, counted from 1, by the state after it."""
    return int(state["epoch"]), int(state["position"])


class Positions(grain.MapDataset[Position]):
    """The positions behind a state; element n is the n-th one.

    A plan follows from the one before it, so plans are made in order, when they are first asked
    for, and the last ones are kept: Grain's threads ask almost in order.

    Args:
        plans: made for this object alone.
        state: of the plans, before element 0.
        kept: positions that may be asked for once more when later ones were.
    """

    def __init__(self, plans: Plans, state: dict[str, Any], kept: int) -> None:
        super().__init__()
        self._plans, self._state, self._kept = plans, state, kept
        self._made: deque[Position] = deque(maxlen=kept)
        self._count = 0
        """Positions that were made."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize  # an end, if there is one, is told by a position without a plan

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        with self._lock:
            if not self._count:
                self._plans.set_state(self._state)
            while self._count <= index:
                self._made.append(self._following())
                self._count += 1
            return self._made[index - self._count]

    def __reduce__(self) -> Any:
        return _positions, (worker_process.dumps((self._plans, self._state, self._kept)),)

    def _following(self) -> Position:
        try:
            plan = next(self._plans)
        except StopIteration:
            plan = None
        return Position(plan=plan, state=self._plans.get_state())


class _Read:
    """Maps a position to its batch."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self, position: Position) -> Delivered:
        state = position.state
        if position.plan is None:
            return Delivered(batch=None, state=state, read=Counter(), failures=())
        batch, reading = self._reader.load(position.plan, place_of(state))
        return Delivered(batch=batch, state=state, read=reading.read, failures=reading.failures)

    def __reduce__(self) -> Any:
        return _read, (worker_process.dumps(self._reader),)


def _positions(pickled: bytes) -> Positions:
    return Positions(*worker_process.loads(pickled))


def _read(pickled: bytes) -> _Read:
    return _Read(worker_process.loads(pickled))


def pipeline(
    make_plans: Callable[[], Plans], state: dict[str, Any], reader: Reader, workers: Workers
) -> grain.IterDataset[Delivered]:
    """The batches behind a state of the plans, read ahead."""
    count, buffered = max(workers.processes, 1), workers.buffered
    positions = Positions(make_plans(), state, kept=2 * count * buffered)
    options = grain.ReadOptions(num_threads=max(workers.threads, 1), prefetch_buffer_size=buffered)
    if not workers.processes:
        return positions.map(_Read(reader)).to_iter_dataset(options)
    worker_process.parse_flags()
    batches = positions.map(_Read(reader)).map(worker_process.packed).to_iter_dataset(options)
    level = logging.getLogger("speechlm2_jax").getEffectiveLevel()
    return batches.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers.processes),
        worker_init_fn=partial(worker_process.initialize, level),
    ).map(worker_process.unpacked)
