"""Reasons to stop early: SIGTERM, and the time limit of a process."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Says between steps whether the process should save and stop, and why."""

    def __init__(self, time_limit_s: float | None = None):
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._limit_s = time_limit_s
        self._signalled = False

    @property
    def reason(self) -> str | None:
        """Why to stop now, or None."""
        if self._signalled:
            return "SIGTERM was received"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the time limit of {self._limit_s:.0f} s is reached"
        return None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM as a request while open. Only the main thread can; others go without."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self._signalled = True

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
