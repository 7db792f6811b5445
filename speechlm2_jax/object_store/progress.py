"""Log lines of long transfers: how many bytes of how many."""

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic

from speechlm2_jax import console

log = logging.getLogger(__name__)
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Transfer:
    """Counts the bytes of a transfer."""

    def __init__(self, total: int = 0) -> None:
        self.total, self.done = total, 0
        self.changed_s = monotonic()
        """When something was transferred last, by the clock of `time.monotonic`."""
        self._mutex = threading.Lock()

    def add(self, count: int) -> None:
        """Counts bytes that were transferred."""
        with self._mutex:
            self.done += count
            self.changed_s = monotonic()

    def __str__(self) -> str:
        return f"{amount(self.done)} of {amount(max(self.total, self.done))}"


@contextmanager
def shown_progress(name: str, total: int) -> Generator[Transfer]:
    """Logs a transfer after two seconds, then every half minute, and how long it took."""
    progress, is_over, begin = Transfer(total), threading.Event(), monotonic()

    def remind() -> None:
        pause_s = console.FIRST_NOTE_S
        while not is_over.wait(pause_s):
            log.info("%s ... %s", name, progress)
            pause_s = console.NEXT_NOTES_S

    reminder = threading.Thread(target=remind, name="transfer", daemon=True)
    reminder.start()
    try:
        yield progress
    finally:
        is_over.set()
        reminder.join()
    if (took_s := monotonic() - begin) > console.FIRST_NOTE_S:
        log.info("%s took %.1f s (%s)", name, took_s, amount(progress.done))


def amount(count: float) -> str:
    """A number of bytes in a readable unit: `1.2 GB`."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"
