"""Tables of the mel front end: analysis windows and the Slaney filterbank, in NumPy."""

import numpy as np

_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0

_COSINE_WINDOWS = {
    "hann": (0.5, 0.5, 0.0),
    "hamming": (0.54, 0.46, 0.0),
    "blackman": (0.42, 0.5, 0.08),
}
WINDOWS = (*_COSINE_WINDOWS, "bartlett")


def analysis_window(name: str, size: int) -> np.ndarray:
    """Gives the symmetric window [size] of that name, in fp32 (Harris 1978)."""
    phase = np.arange(size) / max(size - 1, 1)
    if name == "bartlett":
        return (1.0 - np.abs(2.0 * phase - 1.0)).astype(np.float32)
    a0, a1, a2 = _COSINE_WINDOWS[name]
    wave = a0 - a1 * np.cos(2.0 * np.pi * phase) + a2 * np.cos(4.0 * np.pi * phase)
    return wave.astype(np.float32)


def mel_filterbank(
    *,
    sample_rate_hz: int,
    n_fft: int,
    bins: int,
    low_hz: float,
    high_hz: float,
    area_normalised: bool,
) -> np.ndarray:
    """Gives triangular filters [bins, n_fft // 2 + 1] on the mel scale of Slaney, in fp32.

    The scale (Auditory Toolbox, Slaney 1998) is linear below 1 kHz and logarithmic above. With
    `area_normalised` each triangle has unit area over frequency in Hz; else unit height.
    """
    edges_hz = _mel_to_hz(np.linspace(_hz_to_mel(low_hz), _hz_to_mel(high_hz), bins + 2))
    left, centre, right = (edges_hz[i : bins + i, None] for i in range(3))
    bin_hz = np.linspace(0.0, sample_rate_hz / 2.0, n_fft // 2 + 1)[None, :]
    rising = (bin_hz - left) / (centre - left)
    falling = (right - bin_hz) / (right - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if area_normalised:
        filters = filters * 2.0 / (right - left)
    return filters.astype(np.float32)


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_START_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _LOG_START_MEL + np.log(hz / _LOG_START_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    logarithmic = _LOG_START_HZ * np.exp(_LOG_STEP * (mel - _LOG_START_MEL))
    return np.where(mel < _LOG_START_MEL, mel * _LINEAR_HZ_PER_MEL, logarithmic)
