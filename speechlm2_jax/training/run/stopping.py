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
    """Tells the loop between steps whether to save and stop, and why.

    The n-th call of `poll` returns the same decision in all processes of a run. So all processes
    must call it equally often.
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
        """True if a signal has asked a run of a single process to stop."""
        return self._signal is not None and not self._has_several_processes

    def poll(self) -> str | None:
        """The reason to stop now; None to continue. Several processes stop at the same call."""
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
        """Turns Ctrl-C and SIGTERM into stop requests; a second Ctrl-C exits at once.

        Only the main thread can install signal handlers; in other threads this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or signal.Signals(number)

        # with several processes JAX handles SIGTERM: it notifies the other processes
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
        """Runs in another thread than the main one, which may be busy with a compilation."""
        if number not in SIGNALS:
            return
        self._signal = self._signal or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
        if self._interrupts > 1:
            exit_now("exited at once: the steps since the last checkpoint are lost")
        name = SIGNALS[signal.Signals(number)]
        log.info(
            "%s: stopping after this step, then saving; press Ctrl-C again to exit at once", name
        )


def _notify_other_processes() -> None:
    """Sends SIGTERM to this process, upon which JAX notifies the other processes of the run."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signals_in_a_thread(notice: Callable[[int], None]) -> Iterator[None]:
    """Calls `notice` in a thread when a signal comes.

    Python runs signal handlers between two bytecodes of the main thread. During a compilation that
    can take a minute. The handler in C writes to the wake-up descriptor at once.
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
