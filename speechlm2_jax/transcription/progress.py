"""Progress of a transcription in seconds of audio: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

FIRST_LINES_S, LATER_LINES_S, LATER_FROM_S = 5.0, 30.0, 60.0
"""Seconds between two lines in the first minute, and after it."""


class AudioProgress:
    """Shows how many recordings are done, and the seconds of audio per second.

    Args:
        files: number of recordings.
        audio_s: seconds of audio of all of them, as far as known.
        stream: standard error by default.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        files: int,
        audio_s: float,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files, self._audio_s = files, audio_s
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start_s = self._last_s = clock()
        self._done, self._done_s = 0, 0.0
        self._bar = None
        if self._stream.isatty():
            form = "{percentage:3.0f}%|{bar}| {desc}, {elapsed}<{remaining}"
            self._bar = tqdm(
                total=max(audio_s, 1e-9), file=self._stream, bar_format=form, leave=False
            )
            self._bar.set_description_str(self._text())

    def __enter__(self) -> "AudioProgress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, audio_s: float) -> None:
        """Counts one recording; writes a line if one is due."""
        self._done, self._done_s = self._done + 1, self._done_s + audio_s
        if self._bar is not None:
            self._bar.set_description_str(self._text(), refresh=False)
            self._bar.update(min(audio_s, self._bar.total - self._bar.n))
            return
        now_s = self._clock()
        pause_s = FIRST_LINES_S if now_s - self._start_s < LATER_FROM_S else LATER_LINES_S
        if self._last_s + pause_s <= now_s and self._done < self._files:
            self._last_s = now_s
            print(self._text(), file=self._stream, flush=True)

    def print(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line above the bar, on standard output by default."""
        tqdm.write(text, file=sys.stdout if file is None else file)

    def _text(self) -> str:
        return (
            f"{self._done} of {self._files} recordings, {duration(self._done_s)} of audio, "
            f"{self.speed():.1f} s of audio per second"
        )

    def speed(self) -> float:
        """Seconds of audio per second so far."""
        return self._done_s / max(self._clock() - self._start_s, 1e-9)


def duration(seconds: float) -> str:
    """A duration in its two largest units: 3.2 s, 4 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
