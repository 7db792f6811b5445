"""Reads items one after another, and gives up on one whose storage does not deliver."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    _given_up: list[tuple[threading.Thread, str]] = field(default_factory=list)
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
            worker = _Worker(items[len(done) :], read)
            worker.start()
            done += worker.wait(self.seconds)
            if worker.error is not None:
                raise worker.error
            if len(done) < len(items):
                self._give_up(worker, name(items[len(done)]))
                done.append(late(items[len(done)]))
        return done

    def __reduce__(self) -> tuple[Any, ...]:
        return TimeLimit, (self.seconds,)  # another process counts its own

    def _give_up(self, worker: threading.Thread, item: str) -> None:
        with self._lock:
            self._given_up = [one for one in self._given_up if one[0].is_alive()]
            self._given_up.append((worker, item))
            waiting = [name for _, name in self._given_up]
        if len(waiting) >= MOST_STALLED:
            raise SettingsError(
                f"the storage does not deliver: {len(waiting)} conversations are being read for "
                f"more than {self.seconds:g} s (read_timeout): {', '.join(waiting)}"
            )


class _Worker(threading.Thread, Generic[Item, Read]):
    """Reads items in a thread that may be left behind: a read that hangs cannot be ended."""

    def __init__(self, items: Sequence[Item], read: Callable[[Item], Read]) -> None:
        super().__init__(name="read_in_time", daemon=True)  # must not keep the process alive
        self.error: BaseException | None = None
        self._items, self._read = items, read
        self._results: list[Read] = []
        self._is_done, self._is_left = threading.Event(), False
        self._guard = threading.Lock()

    def run(self) -> None:
        """Reads until the end, an error, or nobody waits any more."""
        for item in self._items:
            try:
                result = self._read(item)
            except BaseException as error:  # noqa: BLE001  raised where it is waited for
                with self._guard:
                    self.error = None if self._is_left else error
                break
            with self._guard:
                if self._is_left:
                    return
                self._results.append(result)
        self._is_done.set()

    def wait(self, seconds: float) -> list[Read]:
        """The results, up to an item that takes longer."""
        before = 0
        while not self._is_done.wait(seconds) and len(self._results) > before:
            before = len(self._results)
        with self._guard:
            self._is_left = True
            return self._results
