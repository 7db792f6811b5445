"""Loudness by ITU-R BS.1770-4, for one channel."""

import functools
import math

import numpy as np

from speechlm2_jax.data.augmentation.effects import Wave

BLOCK_S, OVERLAP = 0.4, 0.75
QUIETEST_LUFS, RELATIVE_LU = -70.0, -10.0
"""Blocks below are silence: absolutely, and relative to the mean of the others."""
_OFFSET_LU = -0.691
_SHELF_HZ, _SHELF_DB, _SHELF_Q = 1500.0, 4.0, 1 / math.sqrt(2)
_HIGHPASS_HZ, _HIGHPASS_Q = 38.0, 0.5


def loudness_lufs(wave: Wave, rate_hz: int) -> float:
    """Loudness units relative to full scale; minus infinity of silence."""
    from scipy.signal import sosfilt

    weighted = np.square(sosfilt(_k_weighting(rate_hz), wave.astype(np.float64)))
    size = max(min(round(BLOCK_S * rate_hz), len(wave)), 1)
    starts = np.arange(0, len(wave) - size + 1, max(round(size * (1 - OVERLAP)), 1))
    sums = np.concatenate([[0.0], np.cumsum(weighted)])
    power = (sums[starts + size] - sums[starts]) / size
    power = power[_lufs(power) > QUIETEST_LUFS]
    if not len(power):
        return -math.inf
    power = power[_lufs(power) > _lufs(power.mean()) + RELATIVE_LU]
    return float(_lufs(power.mean()))


def at_loudness(wave: Wave, rate_hz: int, target_lufs: float) -> Wave:
    """The samples at a loudness; silence stays silence."""
    now = loudness_lufs(wave, rate_hz)
    return wave if math.isinf(now) else wave * np.float32(10 ** ((target_lufs - now) / 20))


def _lufs(power: np.ndarray | np.float64) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return _OFFSET_LU + 10 * np.log10(power)


@functools.lru_cache(maxsize=8)
def _k_weighting(rate_hz: int) -> np.ndarray:
    """A high shelf (the head) and a high pass, as second-order sections of the audio cookbook."""
    w = 2 * math.pi * _SHELF_HZ / rate_hz
    gain, alpha, cos = 10 ** (_SHELF_DB / 40), math.sin(w) / (2 * _SHELF_Q), math.cos(w)
    root = 2 * math.sqrt(gain) * alpha
    shelf = [
        gain * ((gain + 1) + (gain - 1) * cos + root),
        -2 * gain * ((gain - 1) + (gain + 1) * cos),
        gain * ((gain + 1) + (gain - 1) * cos - root),
        (gain + 1) - (gain - 1) * cos + root,
        2 * ((gain - 1) - (gain + 1) * cos),
        (gain + 1) - (gain - 1) * cos - root,
    ]
    w = 2 * math.pi * _HIGHPASS_HZ / rate_hz
    alpha, cos = math.sin(w) / (2 * _HIGHPASS_Q), math.cos(w)
    highpass = [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2, 1 + alpha, -2 * cos, 1 - alpha]
    return np.asarray([np.asarray(s) / s[3] for s in (shelf, highpass)])
