"""Frames of many recordings at once, by a function that counts those of one."""

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import FrameCount

_GRID_BITS = 8
_GRID_SAMPLES = 1 << _GRID_BITS
"""A frame lasts longer, so that the count changes at most once between two of the grid."""
_MOST_SAMPLES = 1 << 25
"""Longer recordings are counted one by one: 35 minutes at 16 kHz."""


class FrameTable:
    """A frame count as a table: the counts on a grid of lengths, and where they change between.

    Args:
        frame_count: samples -> frames.
        longest: samples of the longest recording.
    """

    def __init__(self, frame_count: FrameCount, longest: int) -> None:
        self._count = frame_count
        cells = (min(longest, _MOST_SAMPLES) >> _GRID_BITS) + 1
        counts = [frame_count(cell << _GRID_BITS) for cell in range(cells + 1)]
        self._before = np.asarray(counts[:-1])
        self._step = np.diff(counts)
        self._change = (np.arange(cells) + 1) << _GRID_BITS
        for cell in np.flatnonzero(self._step).tolist():
            self._change[cell] = self._changed(cell << _GRID_BITS, counts[cell])
        self._end = cells << _GRID_BITS

    @property
    def values(self) -> list[tuple[int, int]]:
        """(samples, frames) of each change, for a fingerprint."""
        cells = np.flatnonzero(self._step)
        after = self._before[cells] + self._step[cells]
        return list(zip(self._change[cells].tolist(), after.tolist(), strict=True))

    def __call__(self, samples: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The frames of recordings."""
        is_far = samples >= self._end
        cell = np.minimum(samples, self._end - 1) >> _GRID_BITS
        frames = self._before[cell]
        frames += self._step[cell] * (samples >= self._change[cell])
        if is_far.any():
            for index in np.flatnonzero(is_far).tolist():
                frames[index] = self._count(int(samples[index]))
        return frames

    def _changed(self, begin: int, before: int) -> int:
        """The first length behind a place of the grid that has another count."""
        low, high = begin, begin + _GRID_SAMPLES
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._count(middle) == before else (low, middle)
        return high
