"""The bucket of each step: a pure function of the seed and the step, the same on every host."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: multiples of it fill the circle most evenly (Weyl's sequence)."""
_CIRCLE = 1 << 64


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Draws buckets with given shares, each as often as it should be in any stretch of steps.

    Were they drawn independently, what waits for a rare bucket would grow like a random walk.
    """

    shares: tuple[float, ...]
    """Of the steps; they add to 1."""
    seed: int

    def bucket(self, step: int) -> int:
        """The bucket of a step, counted from 0."""
        start = int(np.random.default_rng([self.seed, 4000]).integers(0, 1 << 62))
        place = (start + step * _GOLDEN) % _CIRCLE / _CIRCLE
        ends = np.cumsum(self.shares)
        return min(int(np.searchsorted(ends, place, side="right")), len(self.shares) - 1)


def step_shares(examples: Float[np.ndarray, " B"], rows: Float[np.ndarray, " B"]) -> list[float]:
    """The share of the steps of each bucket, by its share of the examples and its batch size."""
    steps = examples / rows
    return (steps / steps.sum()).tolist()
