"""Where a recording is loud enough for speech: the silences between which words lie."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from speechlm2_jax.inference.long_form.pauses import FRAME_S, frame_power, loud_frames

MIN_SILENCE_S = 0.2
"""Shorter silences lie within words: before the burst of a stop consonant."""


class Silence(NamedTuple):
    """A quiet span of a recording, in seconds."""

    start: float
    end: float

    @property
    def middle(self) -> float:
        """The time in its middle."""
        return (self.start + self.end) / 2


def find_silences(wave: Float[np.ndarray, " S"], rate_hz: int) -> list[Silence]:
    """Finds the quiet start of a recording, silences of at least MIN_SILENCE_S, and its quiet end.

    Start and end may have no length. A recording that is quiet throughout has no words between.
    """
    hop = max(round(FRAME_S * rate_hz), 1)
    hop_s = hop / rate_hz  # at 22,050 Hz not FRAME_S
    duration_s = len(wave) / rate_hz
    loud = np.flatnonzero(loud_frames(frame_power(wave, hop)))
    if not len(loud):
        return [Silence(0.0, 0.0), Silence(duration_s, duration_s)]
    after = loud[:-1][np.diff(loud) > 1]  # the last loud frame before each silence
    before = loud[1:][np.diff(loud) > 1]
    inner = [
        Silence(float(a + 1) * hop_s, float(b) * hop_s)
        for a, b in zip(after, before, strict=True)
        if (b - a - 1) * hop_s >= MIN_SILENCE_S
    ]
    end_s = min(float(loud[-1] + 1) * hop_s, duration_s)
    return [Silence(0.0, float(loud[0]) * hop_s), *inner, Silence(end_s, duration_s)]
