"""Silence in what was said: most of a channel of a conversation, and nothing to write down."""

import numpy as np
from jaxtyping import Float

WINDOW_S = 0.02
QUIET = 1e-2
"""A window whose loudest sample is below this share of the loudest of all is silent (-40 dB)."""
KEPT_S = 0.25
"""Silence that stays on each side of speech."""


def without_long_silence(wave: Float[np.ndarray, " S"], rate_hz: int) -> Float[np.ndarray, " S2"]:
    """Shortens every silence of more than 2 * KEPT_S, and that before and after all speech.

    A recogniser that normalises a recording by its mean and deviation hears little of a second of
    speech in a minute of zeros. What is silent throughout stays as it is.
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
