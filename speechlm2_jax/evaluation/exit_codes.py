"""How an evaluation ends: bad input, Ctrl-C and SIGTERM each become one line and an exit code."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from speechlm2_jax.settings import SettingsError


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def exit_code(program: str, action: Callable[[], None]) -> int:
    """Runs `action`. Returns 0, 2 after a SettingsError, or 128 + signal after an interruption."""
    try:
        with interruptible():
            action()
    except SettingsError as error:
        line = "; ".join(filter(None, [str(error), notes(error)]))
        print(f"{program}:", " ".join(line.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return report_interruption(program, error)
    return 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM raise Terminated, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report_interruption(program: str, error: KeyboardInterrupt) -> int:
    """Prints one line with the error's notes; returns the exit code, 128 + the signal."""
    is_terminated = isinstance(error, Terminated)
    how = "terminated" if is_terminated else "interrupted"
    print(f"{program}: {how}; {notes(error) or 'nothing is kept'}", file=sys.stderr)
    return 128 + (signal.SIGTERM if is_terminated else signal.SIGINT)


def notes(error: BaseException) -> str:
    """The notes of an error (`add_note`) as one line."""
    return "; ".join(getattr(error, "__notes__", ()))
