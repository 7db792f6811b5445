"""Reads items one after another, and gives up on one whose storage does not deliver."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from speechlm2_jax.settings import SettingsError

MOST_STALLED = 4
"""Reads that may be waiting at once, given up, before the storage counts as lost."""

Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass
class TimeLimit:
    """A time limit per item; None: no limit. One object watches all threads of a stream."""

    seconds: float | None = None
    _given_up: list[tuple["_Work[Any, Any]", str]] = field(default_factory=list)
    _idle: list["_Worker"] = field(default_factory=list)
    """A new thread for each call cost a fifth of the speed: it starts on a core that is busy."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_all(
        self,
        items: Sequence[Item],
        read: Callable[[Item], Read],
        late: Callable[[Item], Read],
        name: Callable[[Item], str],
    ) -> list[Read]:
        """The results of `read`, in order; of an item that takes too long, that of `late`.

        Raises what `read` raises, and SettingsError, naming the items, if MOST_STALLED of them are
        still waiting.
        """
        if self.seconds is None:
            return [read(item) for item in items]
        done: list[Read] = []
        while len(done) < len(items):
            work = _Work(items[len(done) :], read)
            worker = self._idle_worker()
            worker.do(work)
            done += work.wait(self.seconds)
            if work.error is not None:
                raise work.error
            if len(done) < len(items):
                self._give_up(work, name(items[len(done)]))
                done.append(late(items[len(done)]))
            else:
                self._idle.append(worker)
        return done

    def _idle_worker(self) -> "_Worker":
        try:
            return self._idle.pop()
        except IndexError:
            worker = _Worker()
            worker.start()
            return worker

    def __reduce__(self) -> tuple[Any, ...]:
        return TimeLimit, (self.seconds,)  # another process counts its own

    def _give_up(self, work: "_Work[Any, Any]", item: str) -> None:
        with self._lock:
            self._given_up = [one for one in self._given_up if not one[0].is_over]
            self._given_up.append((work, item))
            waiting = [name for _, name in self._given_up]
        if len(waiting) >= MOST_STALLED:
            raise SettingsError(
                f"the storage does not deliver: {len(waiting)} conversations are being read for "
                f"more than {self.seconds:g} s (read_timeout): {', '.join(waiting)}"
            )


class _Work(Generic[Item, Read]):
    """Items to read, and what was read of them so far."""

    def __init__(self, items: Sequence[Item], read: Callable[[Item], Read]) -> None:
        self.error: BaseException | None = None
        self.is_over = False
        """Whether its thread is free again."""
        self._items, self._read = items, read
        self._results: list[Read] = []
        self._is_done, self._is_left = threading.Event(), False
        self._guard = threading.Lock()

    def do(self) -> None:
        """Reads until the end, an error, or nobody waits any more."""
        try:
            for item in self._items:
                result = self._read(item)
                with self._guard:
                    if self._is_left:
                        return
                    self._results.append(result)
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            with self._guard:
                self.error = None if self._is_left else error
        finally:
            self.is_over = True
            self._is_done.set()

    def wait(self, seconds: float) -> list[Read]:
        """The results, up to an item that takes longer."""
        before = 0
        while not self._is_done.wait(seconds) and len(self._results) > before:
            before = len(self._results)
        with self._guard:
            self._is_left = True
            return self._results


class _Worker:
    """A thread that reads, and may be left behind: a read that hangs cannot be ended."""

    def __init__(self) -> None:
        self._todo: SimpleQueue[_Work[Any, Any] | None] = SimpleQueue()
        weakref.finalize(self, self._todo.put, None)  # so its thread ends with it

    def start(self) -> None:
        """Starts the thread, which must not keep the process alive."""
        thread = threading.Thread(target=_serve, args=(self._todo,), name="read_in_time")
        thread.daemon = True
        thread.start()

    def do(self, work: _Work[Any, Any]) -> None:
        """Begins to read."""
        self._todo.put(work)


def _serve(todo: "SimpleQueue[_Work[Any, Any] | None]") -> None:
    while (work := todo.get()) is not None:
        work.do()
        del work  # and what it read
