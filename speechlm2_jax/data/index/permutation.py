"""A keyed pseudo-random permutation that is computed only where it is asked for."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

_ROUNDS = 8
_AT_ONCE = 1 << 15
"""Positions whose work arrays fit a processor's cache."""
_GOLDEN, _MULTIPLIER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF, _FEW = np.uint64(32), np.uint64(29)
Words = TypeVar("Words", np.ndarray, np.uint64)


class Permutation:
    """A bijection of [0, size) by a key; a position costs the same wherever it is.

    A balanced Feistel network permutes pairs of numbers below ceil(sqrt(size)) (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). What lands outside [0, size) is permuted again.

    Args:
        size: below 2**62.
        key: integers that name the permutation, none negative.
    """

    def __init__(self, size: int, key: Sequence[int]) -> None:
        if not 0 <= size < 1 << 62:
            raise ValueError(f"a permutation is of 0 to 2**62 - 1 elements, not {size}")
        self.size = size
        self._side = math.isqrt(size - 1) + 1 if size else 0
        self._keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)

    def __call__(
        self, positions: Int[np.ndarray, " n"], tweak: int | Int[np.ndarray, " n"] = 0
    ) -> Int[np.ndarray, " n"]:
        """The elements at positions.

        Args:
            positions: each in [0, size).
            tweak: not negative; each names another permutation, as the number of a pass does.
        """
        images = np.empty(len(positions), np.int64)
        tweaks = np.broadcast_to(np.asarray(tweak, np.uint64), images.shape)
        for start in range(0, len(images), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            images[part] = self._walk(positions[part], tweaks[part])
        return images

    def _walk(self, positions: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
        words = _mixed(tweaks * _GOLDEN + _GOLDEN)
        images = self._network(np.asarray(positions, np.int64).astype(np.uint64), words)
        while len(outside := np.flatnonzero(images >= self.size)):
            images[outside] = self._network(images[outside], words[outside])
        return images.astype(np.int64)

    def _network(self, numbers: np.ndarray, tweaks: np.ndarray) -> np.ndarray:
        side = np.uint64(self._side)
        left, right = np.divmod(numbers, side)
        for key in self._keys:
            # the upper half of 32 random bits times `side` is uniform below `side`
            shift = ((_mixed((right ^ key) + tweaks) >> _HALF) * side) >> _HALF
            moved = left + shift
            moved -= side * (moved >= side)
            left, right = right, moved
        return left * side + right


def _mixed(words: Words) -> Words:
    """Every bit of a word depends on all (a multiply-xorshift finaliser)."""
    words = words * _GOLDEN
    words = (words ^ (words >> _HALF)) * _MULTIPLIER
    return words ^ (words >> _FEW)
