"""What is done to the samples of a recording as it is read; nothing here changes a length.

Lhotse's transforms do the work. Which, and how strongly, is drawn from a generator that is given.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.data.audio import AudioError, resample, sinc_resample
from speechlm2_jax.data.augmentation.config import Codec, Interval

GSM_HZ = 8000
"""The rate of the codec gsm."""
OPUS_HZ = (8000, 12000, 16000, 24000, 48000)
MP3_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Rates that a codec encodes; others are resampled to the next higher one, and back."""
CUTOFF_STEP_HZ = 50
"""Cut-offs are multiples of it: filters are few, so they are designed once."""

Wave = Float[np.ndarray, " S"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What an effect on one recording draws from."""

    rng: np.random.Generator
    report: Callable[[AudioError], None]
    """Is told of noise, or of an impulse response, that cannot be read."""


class Effect(Protocol):
    """A random change of samples that keeps their number."""

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The changed samples, or the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Multiplies by a random factor, as Lhotse's PerturbVolume."""

    probability: float
    factor: Interval

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The louder or softer samples."""
        if draw.rng.random() >= self.probability:
            return wave
        return wave * np.float32(draw.rng.uniform(*self.factor))


@dataclass(frozen=True, kw_only=True)
class Lowpass:
    """Removes what is above a random frequency, as Lhotse's LowpassUsingResampling."""

    probability: float
    cutoff_hz: Interval

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The filtered samples."""
        if draw.rng.random() >= self.probability:
            return wave
        low, high = map(math.log, self.cutoff_hz)
        steps = round(math.exp(draw.rng.uniform(low, high)) / CUTOFF_STEP_HZ)
        return lowpass(wave, rate_hz, max(steps, 1) * CUTOFF_STEP_HZ)


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Saturates, as Lhotse's ClippingTransform."""

    probability: float
    probability_hard: float
    gain_db: Interval
    normalize: bool
    oversampling: int | None

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The saturated samples."""
        if draw.rng.random() >= self.probability:
            return wave
        hard = bool(draw.rng.random() < self.probability_hard)
        return clip_amplitude(
            wave,
            rate_hz,
            hard=hard,
            gain_db=draw.rng.uniform(*self.gain_db),
            normalize=self.normalize,
            oversampling=self.oversampling or 1,
        )


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Encodes and decodes by a codec, as Lhotse's Compress."""

    probability: float
    level: Interval
    codecs: tuple[Codec, ...]
    weights: tuple[float, ...] | None

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The decoded samples."""
        if draw.rng.random() >= self.probability:
            return wave
        level = draw.rng.uniform(*self.level)
        weights = np.asarray(self.weights or [1.0] * len(self.codecs))
        chosen = draw.rng.choice(len(self.codecs), p=weights / weights.sum())
        return compress(wave, rate_hz, codec=self.codecs[chosen], level=level)


def lowpass(wave: Wave, rate_hz: int, cutoff_hz: int) -> Wave:
    """Removes frequencies above a cut-off, by resampling to twice of it and back."""
    if 2 * cutoff_hz >= rate_hz:
        return wave
    return fitted(resample(resample(wave, rate_hz, 2 * cutoff_hz), 2 * cutoff_hz, rate_hz), wave)


def clip_amplitude(
    wave: Wave,
    rate_hz: int,
    *,
    hard: bool,
    gain_db: float,
    normalize: bool = True,
    oversampling: int = 1,
) -> Wave:
    """Amplifies, limits to [-1, 1] (`hard`: cut off, else tanh), and takes the gain back."""
    from lhotse.augmentation import Clipping as Saturation

    saturate = Saturation(hard=hard, gain_db=gain_db, normalize=normalize)
    fine_hz = oversampling * rate_hz
    fine = resample(wave, rate_hz, fine_hz)
    return fitted(resample(saturate(fine[None], fine_hz)[0], fine_hz, rate_hz), wave)


def compress(wave: Wave, rate_hz: int, *, codec: Codec, level: float) -> Wave:
    """Encodes and decodes; `level` is from 0, the highest bit rate of a codec, to 1."""
    from lhotse.augmentation import Compress

    coded_hz = _coded_hz(codec, rate_hz)
    coder = cast(Callable[..., np.ndarray], Compress(codec=codec, compression_level=level))
    decoded = coder(resample(wave, rate_hz, coded_hz)[None], coded_hz)[0]
    return fitted(resample(decoded, coded_hz, rate_hz), wave)


def change_speed(wave: Wave, rate_hz: int, factor: float) -> Wave:
    """Plays `factor` times as fast, pitch included, as Lhotse's Speed: `changed_length` samples."""
    played = sinc_resample(wave, round(factor * rate_hz), rate_hz)
    return _of_length(played, changed_length(len(wave), factor))


def changed_length(samples: int, factor: float) -> int:
    """Samples that are left at a speed: as Lhotse counts them, halves up where it is faster."""
    return int(changed_lengths(np.asarray([samples]), np.asarray([factor]))[0])


def changed_lengths(
    samples: Int[np.ndarray, " n"], factor: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """`changed_length` of many."""
    exact = np.round(samples / factor, 8)
    return np.where(factor >= 1, np.floor(exact + 0.5), np.ceil(exact - 0.5)).astype(np.int64)


def fitted(wave: Wave, like: Wave) -> Wave:
    """As many samples as another recording has: codecs and resampling round."""
    return _of_length(wave, len(like))


def _of_length(wave: Wave, samples: int) -> Wave:
    wave = np.asarray(wave[:samples], np.float32)
    return wave if len(wave) == samples else np.pad(wave, (0, samples - len(wave)))


def _coded_hz(codec: Codec, rate_hz: int) -> int:
    if codec == "gsm":
        return GSM_HZ
    rates = {"opus": OPUS_HZ, "mp3": MP3_HZ}.get(codec, (rate_hz,))
    return next((rate for rate in rates if rate >= rate_hz), rates[-1])
