"""Reasons to stop early: Ctrl-C, SIGTERM, and the time limit of a process."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from speechlm2_jax import processes
from speechlm2_jax.console import exit_now

log = logging.getLogger(__name__)

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopRequest:
    """Says between steps whether the run should save and stop, and why.

    In a run of several processes all get the same answer to the same question, so each must ask
    equally often.
    """

    def __init__(self, time_limit_s: float | None = None):
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._limit_s = time_limit_s
        self._signal: signal.Signals | None = None
        self._interrupts = 0
        self._has_several_processes = jax.process_count() > 1
        self._calls = 0
        self._has_notified = self._agreed = False

    @property
    def is_signalled(self) -> bool:
        """True once somebody asked this process, the only one, to stop."""
        return self._signal is not None and not self._has_several_processes

    def poll(self) -> str | None:
        """Why to stop now, or None."""
        reason = self._own_reason()
        if not self._has_several_processes:
            return reason
        if reason is not None and not self._has_notified:
            self._has_notified = True
            _notify_other_processes()
        self._calls += 1
        self._agreed = self._agreed or processes.reached_stop_point(self._calls)
        return (reason or "a process of the run was told to stop") if self._agreed else None

    def _own_reason(self) -> str | None:
        if self._signal is not None:
            return f"{SIGNALS[self._signal]} was received"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the time limit of {self._limit_s:.0f} s is reached"
        return None

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Takes Ctrl-C and SIGTERM as requests while open; a second Ctrl-C leaves at once.

        Only the main thread can; others go without.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or signal.Signals(number)

        # in a run of several, SIGTERM is JAX's: it tells the other processes
        own = [
            number
            for number in SIGNALS
            if number == signal.SIGINT or not self._has_several_processes
        ]
        before = {number: signal.signal(number, handle) for number in own}
        try:
            with _signals_in_a_thread(self._on_signal):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int) -> None:
        """Answers a signal while the main thread may be far from running a handler."""
        if number not in SIGNALS:
            return
        self._signal = self._signal or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
        if self._interrupts > 1:
            exit_now("left at once: what was done since the last checkpoint is lost")
        name = SIGNALS[signal.Signals(number)]
        log.info("%s: stopping after this step, then saving; Ctrl-C again leaves at once", name)


def _notify_other_processes() -> None:
    """Lets the other processes know, which JAX does when it sees SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signals_in_a_thread(notice: Callable[[int], None]) -> Iterator[None]:
    """Calls `notice` in a thread when a signal comes.

    Python runs handlers between two lines of the main thread, which a compilation keeps for a
    minute; the wake-up descriptor is written by the handler in C.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while number := reader.recv(1):
            notice(number[0])

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()
