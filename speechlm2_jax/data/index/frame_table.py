"""Frames of many recordings at once, by a function that counts those of one."""

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import FrameCount

_GRID_SAMPLES = 320
"""A frame lasts longer, so that the count changes at most once between two of the grid."""
_MOST_SAMPLES = 1 << 25
"""Longer recordings are counted one by one: 35 minutes at 16 kHz."""


class FrameTable:
    """A frame count as a table of the lengths at which it changes.

    Args:
        frame_count: samples -> frames.
        longest: samples of the longest recording.
    """

    def __init__(self, frame_count: FrameCount, longest: int) -> None:
        self._count = frame_count
        self._end = min(longest, _MOST_SAMPLES) + _GRID_SAMPLES
        grid = list(range(0, self._end + _GRID_SAMPLES, _GRID_SAMPLES))
        counts = [frame_count(samples) for samples in grid]
        starts, values = [0], [counts[0]]
        for begin, before, after in zip(grid, counts, counts[1:], strict=False):
            if before != after:
                starts.append(self._change(begin, before))
                values.append(after)
        self._starts, self._values = np.asarray(starts), np.asarray(values)

    @property
    def values(self) -> list[tuple[int, int]]:
        """(samples, frames) of each change, for a fingerprint."""
        return list(zip(self._starts.tolist(), self._values.tolist(), strict=True))

    def __call__(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The frames of recordings."""
        frames = self._values[np.searchsorted(self._starts, samples, side="right") - 1]
        for index in np.flatnonzero(samples > self._end).tolist():
            frames[index] = self._count(int(samples[index]))
        return frames

    def _change(self, begin: int, before: int) -> int:
        """The first length after `begin` on the grid that has another count."""
        low, high = begin, begin + _GRID_SAMPLES
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._count(middle) == before else (low, middle)
        return high
