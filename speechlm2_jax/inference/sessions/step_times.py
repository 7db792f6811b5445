"""Times of the last steps, by which a pool of sessions decides whether one more can join."""

from collections import deque

import numpy as np

WINDOW = 256
"""Steps that are looked at."""


class StepTimes:
    """Running 95th percentile of the last `WINDOW` times."""

    def __init__(self) -> None:
        self._seconds = deque[float](maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """Takes the time of one more step."""
        self._seconds.append(seconds)

    @property
    def p95_s(self) -> float:
        """95th percentile in seconds; 0 without any time."""
        return float(np.percentile(self._seconds, 95)) if self._seconds else 0.0
