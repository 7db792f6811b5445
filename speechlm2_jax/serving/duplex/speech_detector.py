"""Finds where a user's speech begins and ends, by its level above the noise."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

BLOCK_S = 0.02
FLOOR_DB = -55.0
"""Below it is no speech, however quiet the noise."""
ABOVE_NOISE_DB = 10.0
RISE_DB = 0.05
"""By which the estimate of the noise rises per block; it falls at once."""
BEGIN_BLOCKS = 4
"""Loud blocks in a row that begin speech."""
END_BLOCKS = 25
"""Quiet blocks in a row that end it."""
PADDING_BLOCKS = 10
"""By which speech begins before its first loud block."""


@dataclass(frozen=True)
class SpeechEdge:
    """Where speech begins or ends."""

    is_begin: bool
    at_ms: int
    """From the start of the audio."""


class SpeechDetector:
    """Tells the edges of speech in audio that comes in any pieces."""

    def __init__(self, rate_hz: int) -> None:
        self._block = round(BLOCK_S * rate_hz)
        self._held = np.zeros(0, np.float32)
        self._blocks = self._run = 0
        self._noise_db = FLOOR_DB
        self.is_speech = False

    def push(self, samples: Float[np.ndarray, " S"]) -> Iterator[SpeechEdge]:
        """Takes the next samples [S] within [-1, 1]; iterates over the edges in them."""
        held = np.concatenate([self._held, samples])
        count = len(held) // self._block
        blocks = held[: count * self._block].reshape(count, self._block)
        self._held = held[count * self._block :]
        levels = 10 * np.log10(np.square(blocks).mean(1) + 1e-10)
        for level in levels.tolist():
            yield from self._next(level)

    def _next(self, level_db: float) -> Iterator[SpeechEdge]:
        self._blocks += 1
        self._noise_db = max(min(level_db, self._noise_db + RISE_DB), FLOOR_DB - ABOVE_NOISE_DB)
        is_loud = level_db > max(self._noise_db + ABOVE_NOISE_DB, FLOOR_DB)
        self._run = self._run + 1 if is_loud != self.is_speech else 0
        if self._run < (END_BLOCKS if self.is_speech else BEGIN_BLOCKS):
            return
        self.is_speech = not self.is_speech
        first = self._blocks - self._run
        self._run = 0
        if self.is_speech:
            first = max(0, first - PADDING_BLOCKS)
        yield SpeechEdge(self.is_speech, round(1000 * first * BLOCK_S))
