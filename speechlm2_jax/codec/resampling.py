"""Resampling of a batch of waveforms on the device, by a Hann-windowed sinc.

It equals torchaudio's resampler with its defaults, which NeMo runs before its codec. The host's
resampler, `data.audio.resample`, is Lhotse's; they differ by about 2e-3 on noise.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float

from speechlm2_jax.arrays import Size

CROSSINGS = 6
"""Zero crossings of the sinc on each side."""
ROLL_OFF = 0.99
"""Cutoff of the filter, as a fraction of the lower Nyquist frequency."""


def resampled_length(samples: Size, from_hz: int, to_hz: int) -> Size:
    """Counts the samples after resampling, rounded up. Takes an int or an integer array."""
    gcd = math.gcd(from_hz, to_hz)
    step, phases = from_hz // gcd, to_hz // gcd
    # in two parts, since samples * phases may overflow int32
    return samples // step * phases - (-(samples % step) * phases // step)


def resample(audio: Float[Array, "B S"], from_hz: int, to_hz: int) -> Float[Array, "B S2"]:
    """Resamples [B, S] audio, with zeros beyond its ends.

    Raises ValueError for a rate that is not positive.
    """
    if from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"sample rates must be positive, got {from_hz} and {to_hz} Hz")
    if from_hz == to_hz:
        return audio
    gcd = math.gcd(from_hz, to_hz)
    filters, reach = _filters(from_hz // gcd, to_hz // gcd)
    step, taps = from_hz // gcd, filters.shape[1]
    batch, samples = audio.shape
    # output block i uses the taps from input block i on
    count, overlapping = samples // step + 1, -(-taps // step)
    length = (count + overlapping) * step
    padded = jnp.pad(audio, ((0, 0), (reach, length - reach - samples)))
    blocks = padded.reshape(batch, -1, step)
    windows = jnp.concatenate([blocks[:, i : i + count] for i in range(overlapping)], axis=2)
    out = jnp.matmul(windows[..., :taps], jnp.asarray(filters).T, precision=Precision.HIGHEST)
    return out.reshape(batch, -1)[:, : resampled_length(samples, from_hz, to_hz)]


def _filters(step: int, phases: int) -> tuple[np.ndarray, int]:
    """Makes one filter per output sample of a block [phases, taps]; and the taps before it."""
    cutoff = min(step, phases) * ROLL_OFF
    reach = math.ceil(CROSSINGS * step / cutoff)
    inputs = np.arange(-reach, reach + step) / step
    time = (inputs[None] - np.arange(phases)[:, None] / phases) * cutoff
    time = np.clip(time, -CROSSINGS, CROSSINGS)
    window = np.cos(time * np.pi / CROSSINGS / 2) ** 2
    return (np.sinc(time) * window * cutoff / step).astype(np.float32), reach
