"""Where a recording is loud enough for speech: the silences between which words lie."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

FRAME_S = 0.01
LOUD_SHARE = 1e-3
"""A frame is loud if its power is above this share (-30 dB) of the 95th percentile, ..."""
ABOVE_NOISE = 4.0
"""... and above this multiple (6 dB) of the 5th percentile, which is the noise between words."""
SPEECH_SHARE = 0.1
"""A frame above this share of the 95th percentile is loud in any noise."""
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
    is_loud = _is_loud(wave, max(round(FRAME_S * rate_hz), 1))
    duration_s = len(wave) / rate_hz
    loud = np.flatnonzero(is_loud)
    if not len(loud):
        return [Silence(0.0, 0.0), Silence(duration_s, duration_s)]
    after = loud[:-1][np.diff(loud) > 1]  # the last loud frame before each silence
    before = loud[1:][np.diff(loud) > 1]
    inner = [
        Silence(float(a + 1) * FRAME_S, float(b) * FRAME_S)
        for a, b in zip(after, before, strict=True)
        if (b - a - 1) * FRAME_S >= MIN_SILENCE_S
    ]
    end_s = min(float(loud[-1] + 1) * FRAME_S, duration_s)
    return [Silence(0.0, float(loud[0]) * FRAME_S), *inner, Silence(end_s, duration_s)]


def _is_loud(wave: np.ndarray, hop: int) -> Bool[np.ndarray, " F"]:
    """Whether each frame of `hop` samples is loud; the last part of a frame is left out."""
    count = len(wave) // hop
    if not count:
        return np.zeros(0, bool)
    frames = wave[: count * hop].reshape(count, hop)
    power = np.einsum("fs,fs->f", frames, frames) / hop
    speech, noise = np.quantile(power, 0.95), np.quantile(power, 0.05)
    level = max(LOUD_SHARE * speech, ABOVE_NOISE * noise)
    return power > min(level, SPEECH_SHARE * speech)
