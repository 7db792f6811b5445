"""A frame count that is remembered, and that goes to other processes without its model."""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.index.frame_table import FrameTable

_KEPT = 1 << 16


class CachedFrameCount:
    """Counts the frames of recordings, each length once.

    Args:
        frame_count: samples -> frames.
    """

    def __init__(self, frame_count: FrameCount) -> None:
        self._count = functools.lru_cache(_KEPT)(frame_count)
        self._frame_count = frame_count
        self._longest = 0

    def __call__(self, samples: int) -> int:
        """The frames of a recording."""
        self._longest = max(self._longest, samples)
        return self._count(samples)

    def without_model(self) -> tuple[Any, ...]:
        """For `pickle`: the counts up to the longest recording so far, as a table."""
        table = FrameTable(self._frame_count, self._longest)
        return _TableCount, ([(0, self._frame_count(0)), *table.values],)


class _TableCount:
    """The same by (samples, frames) of each change."""

    def __init__(self, changes: Sequence[tuple[int, int]]) -> None:
        self._starts, self._frames = zip(*changes, strict=True)

    def __call__(self, samples: int) -> int:
        return self._frames[bisect_right(self._starts, samples) - 1]
