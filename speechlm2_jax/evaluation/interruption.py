"""Ctrl-C and SIGTERM end an evaluation with one line, and with what is answered kept."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever runs this machine wants the process to end."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Has SIGTERM raise Terminated inside, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report_interruption(program: str, error: KeyboardInterrupt) -> int:
    """Prints one line with what was noted on the way; gives the exit code, 128 + the signal."""
    is_terminated = isinstance(error, Terminated)
    how = "terminated" if is_terminated else "interrupted"
    print(f"{program}: {how}; {notes(error) or 'nothing is kept'}", file=sys.stderr)
    return 128 + (signal.SIGTERM if is_terminated else signal.SIGINT)


def notes(error: BaseException) -> str:
    """What was added to an error on its way (`add_note`)."""
    return "; ".join(getattr(error, "__notes__", ()))
