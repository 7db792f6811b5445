"""Tries again what may succeed later, within a time limit."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from speechlm2_jax.data.storage.errors import StorageError, TemporaryError

ATTEMPTS = 4
_FIRST_PAUSE_S = 0.25
STALL_S = 30.0
"""Without a byte for so long, an attempt is given up."""
Result = TypeVar("Result")


class Patience:
    """How long one file is waited for; None: as long as its attempts take."""

    def __init__(self, limit_s: float | None) -> None:
        self._end = None if limit_s is None else time.monotonic() + limit_s
        self.stall_s = STALL_S if limit_s is None else max(min(STALL_S, limit_s / ATTEMPTS), 0.01)
        """How long one attempt may wait for a byte."""

    def pauses(self) -> Iterator[float]:
        """The pause before each further attempt, as long as there is time for one."""
        for number in range(ATTEMPTS - 1):
            pause = min(_FIRST_PAUSE_S * 4**number, self.stall_s)
            if self._end is not None and time.monotonic() + pause >= self._end:
                return
            yield pause


def persistently(attempt: Callable[[], Result], patience: Patience) -> Result:
    """The result of the first attempt that succeeds. Raises StorageError, as the last one does."""
    pauses = patience.pauses()
    while True:
        try:
            return attempt()
        except TemporaryError as error:
            pause = next(pauses, None)
            if pause is None:
                raise StorageError(str(error), cause=error.cause) from error
        time.sleep(pause)


def in_time(attempt: Callable[[], Result], seconds: float, name: str) -> Result:
    """The result of a call to a library without time limits of its own.

    Raises what it raises, and TemporaryError if it takes too long: its thread is left behind.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(attempt())
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="read_storage", daemon=True).start()
    if not done.wait(seconds):
        raise TemporaryError(f"{name}: nothing came within {seconds:g} s", cause="timed_out")
    if errors:
        raise errors[0]
    return results[0]
