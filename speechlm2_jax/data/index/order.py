"""The order of a large data set: a pure function of seed, epoch and position.

An epoch is cut into windows of consecutive positions. The order of a window is computed without
the windows before it.
"""

import functools
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.index.permutation import Permutation
from speechlm2_jax.data.sampler import MIXTURE, ORDER, apportion


@dataclass(frozen=True, kw_only=True)
class Order:
    """In which order an epoch goes through sources whose rows follow one another."""

    sizes: tuple[int, ...]
    """Rows of each source."""
    shares: tuple[float, ...] | None = None
    """Of each source in an epoch; it continues from there in the next one. None: all its rows."""
    seed: int = 0
    shuffle: bool = False
    is_mixed: bool = False
    """Whether sources without shares are interleaved; with shares they always are."""
    shards: tuple[tuple[int, ...], ...] = ()
    """Of each source, the rows of its shards, whose order is drawn anew for each pass."""
    shard_seeds: tuple[int, ...] = ()
    """Of each source; with an integer `shard_seed` the order of its shards is NeMo's."""
    window_rows: int

    @property
    def total(self) -> int:
        """Rows of an epoch."""
        return sum(self.sizes)

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return max(-(-self.total // self.window_rows), 1)

    def window(self, epoch: int, number: int) -> Int[np.ndarray, " n"]:
        """The rows of a window, in order."""
        begin = number * self.window_rows
        positions = np.arange(begin, min(begin + self.window_rows, self.total))
        if self.shares is not None or (self.is_mixed and not self.shuffle):
            return self._mixture(epoch, number)
        if self.shuffle:
            return self._permutation(-1, self.total)(positions, epoch)
        return self._in_order(positions, epoch)

    def _in_order(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Source after source, each in the order of its manifest."""
        ends = np.cumsum(self.sizes)
        source = np.searchsorted(ends, positions, side="right")
        rows = positions.copy()
        for s in np.unique(source).tolist():
            start = int(ends[s]) - self.sizes[s]
            rows[source == s] = start + self._pass(s, epoch, positions[source == s] - start)
        return rows

    def _mixture(self, epoch: int, number: int) -> np.ndarray:
        """Each source gives its part of the window, in turns that are drawn for it."""
        before, after = self._given[number : number + 2]
        parts: list[np.ndarray] = []
        for s, (begin, end) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            first = sum(self.sizes[:s])
            stretch = epoch * int(self._given[-1, s]) + np.arange(begin, end)
            parts.append(first + self._stretch(s, stretch) if end > begin else stretch)
        turns = np.repeat(np.arange(len(parts)), after - before)
        generator = np.random.default_rng([self.seed, MIXTURE, epoch, number])
        places = np.argsort(generator.permutation(turns), kind="stable")
        rows = np.empty(len(turns), np.int64)
        rows[places] = np.concatenate(parts)
        return rows

    @functools.cached_property
    def _given(self) -> Int[np.ndarray, "windows_plus_1 sources"]:
        """Rows that each source has given of an epoch before each window, and in all of it."""
        sizes = np.asarray(self.sizes)
        left = sizes if self.shares is None else np.asarray(apportion(self.shares, self.total))
        left = np.where(sizes > 0, left, 0)
        given = [np.zeros(len(left), np.int64)]
        for _ in range(self.windows):
            part = _proportional(left, self.window_rows)
            given.append(given[-1] + part)
            left = left - part
        return np.stack(given)

    def _stretch(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """Rows of a source that is gone through again and again, by their number in that."""
        passes, positions = np.divmod(numbers, self.sizes[source])
        if self.shuffle:
            return self._permutation(source, self.sizes[source])(positions, passes)
        rows = positions.copy()
        if len(self._shards_of(source)) > 1:
            for one in np.unique(passes).tolist():
                rows[passes == one] = self._pass(source, one, positions[passes == one])
        return rows

    def _pass(self, source: int, number: int, positions: np.ndarray) -> np.ndarray:
        """A source in the order of its manifest; the order of shards is drawn as Lhotse does."""
        shards = self._shards_of(source)
        if len(shards) < 2:
            return positions
        order = list(range(len(shards)))
        random.Random(self.shard_seeds[source] + number).shuffle(order)  # noqa: S311
        starts = np.cumsum([0, *shards])[order]
        ends = np.cumsum(np.asarray(shards)[order])
        place = np.searchsorted(ends, positions, side="right")
        return positions - (ends - np.asarray(shards)[order])[place] + starts[place]

    def _shards_of(self, source: int) -> tuple[int, ...]:
        return self.shards[source] if self.shards else ()

    def _permutation(self, source: int, size: int) -> Permutation:
        return Permutation(size, (self.seed, ORDER, source + 1))


def _proportional(counts: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of all counts together, in proportion to them, by the largest remainders."""
    total = int(counts.sum())
    if total <= most:
        return counts
    parts, rests = np.divmod(counts * most, total)
    parts[np.argsort(-rests, kind="stable")[: most - int(parts.sum())]] += 1
    return parts
