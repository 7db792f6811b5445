"""Shortens silence: most of one channel of a conversation is silent."""

import numpy as np
from jaxtyping import Float

WINDOW_S = 0.02
QUIET = 1e-2
"""A window is silent if its peak is below this share of the recording's peak (-40 dB)."""
KEPT_S = 0.25
"""Seconds of silence that stay on each side of speech."""


def without_long_silence(wave: Float[np.ndarray, " S"], rate_hz: int) -> Float[np.ndarray, " S2"]:
    """Shortens silences longer than 2 * KEPT_S, and leading and trailing ones to KEPT_S.

    An ASR model that normalises features by mean and deviation of the whole recording misses a
    second of speech in a minute of zeros. A recording without speech is returned unchanged.
    """
    size = max(round(WINDOW_S * rate_hz), 1)
    count = -(-len(wave) // size)
    padded = np.zeros(count * size, wave.dtype)
    padded[: len(wave)] = np.abs(wave)
    loudest = padded.reshape(count, size).max(axis=1, initial=0.0)
    if not loudest.any():
        return wave
    is_loud = loudest >= QUIET * loudest.max()
    reach = np.ones(2 * round(KEPT_S / WINDOW_S) + 1)
    is_kept = np.convolve(is_loud, reach)[len(reach) // 2 :][:count] > 0
    return wave[np.repeat(is_kept, size)[: len(wave)]]
