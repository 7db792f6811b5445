"""Progress of an evaluation: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

FIRST_LINES_S, LATER_LINES_S, LATER_FROM_S = 5.0, 30.0, 60.0
"""Seconds between two lines in the first minute, and after it."""


class ProgressDisplay:
    """Shows how many inputs are processed.

    Args:
        total: number of inputs.
        done: number processed by an earlier, interrupted run.
        what: label before the numbers.
        stream: standard error by default; a terminal gets a bar, anything else whole lines.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        what: str = "generated",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._what = total, done, what
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start_s = self._last_s = clock()
        self._first: tuple[float, int] | None = None
        """Time and count of the first update; the rate leaves out the compilation before it."""
        is_terminal = self._stream.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=what, file=self._stream) if is_terminal else None
        )

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Adds `count`; writes a line if one is due."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now_s = self._clock()
        pause_s = FIRST_LINES_S if now_s - self._start_s < LATER_FROM_S else LATER_LINES_S
        if self._last_s + pause_s <= now_s:
            self._last_s = now_s
            print(self._line(now_s), file=self._stream, flush=True)
        if self._first is None and count:
            self._first = now_s, self._done

    def _line(self, now_s: float) -> str:
        share = self._done / max(self._total, 1)
        text = f"{self._what} {self._done} of {self._total} ({share:.0%})"
        if self._first is None or self._done == self._first[1]:
            return text
        since_s, before = self._first
        rate = (self._done - before) / max(now_s - since_s, 1e-9)
        left_s = (self._total - self._done) / rate
        return f"{text}, {rate:.1f} a second, {_duration(left_s)} left"


def _duration(seconds: float) -> str:
    """A duration in its two largest units, such as `3 min 20 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
