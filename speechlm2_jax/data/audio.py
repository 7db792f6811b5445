"""Waveforms on the host: reading files, resampling, and the checks that a recording must pass.

Everything is float32 mono `[S]`, and needs soundfile, PyAV and SciPy only, so that inference from
files works without Lhotse.
"""

import functools
import math
from collections.abc import Iterable
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio_errors import CAUSES, AudioError
from speechlm2_jax.data.audio_files import AudioFile, open_audio

__all__ = [
    "CAUSES",
    "AudioError",
    "AudioLength",
    "audio_length",
    "check_samples",
    "read_audio",
    "resample",
    "resampled_length",
    "sinc_resample",
]

DURATION_TOLERANCE_S = 0.1
"""How far a file may be from its declared duration: manifests round to one or two digits."""
LOSSY_TOLERANCE_S = 0.5
"""The same for lossy formats, as in Lhotse: some tools count the encoder's delay, some do not."""
LOSSY_TOLERANCE_SHARE = 0.4
"""And at most this share of the declared duration: half of a file is not the file."""
MAX_SAMPLE = 1e10
"""Beyond 32-bit integers kept as floats; squares of much larger samples overflow float32."""
_KAISER_BETA = 5.0
FILTER_CROSSINGS = 10
"""Zero crossings of the sinc on each side of the resampling filter, and its window: SciPy's."""

_SMALL_STEP = 64
"""Up to so many input samples per block, a matmul with mostly zeros is the fastest."""
_SINC_CROSSINGS = 6
_ROLLOFF = 0.99
"""torchaudio's defaults: zero crossings on each side, and the share of the band that is kept."""


def read_audio(
    source: str | Path | BufferedIOBase,
    *,
    sample_rate_hz: int | None = None,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    channel: int | None = None,
    is_segment: bool = True,
) -> Float[np.ndarray, " S"]:
    """Reads a recording, or a stretch of it, as mono samples at `sample_rate_hz`.

    Args:
        source: a file that libsndfile or FFmpeg can read, or one opened in binary mode.
        sample_rate_hz: resample to this rate; None keeps the file's.
        offset_s: where to start, in seconds.
        duration_s: how much to read; None reads to the end.
        channel: which channel, from 0; None is the mean of all.
        is_segment: whether more than `duration_s` may follow. If not, `duration_s` describes the
            whole file, and a file longer by more than the tolerance is refused.

    Raises:
        AudioError: for a recording that cannot be used, with its cause.
    """
    end_s = None if duration_s is None else offset_s + duration_s
    if end_s is not None and not is_segment:
        end_s -= DURATION_TOLERANCE_S  # a header that agrees with the declared duration is believed
    with open_audio(source, end_s=end_s) as file:
        rate_hz, stretch = file.rate_hz, _stretch(file, offset_s, duration_s)
        more = 0 if is_segment or stretch.expected is None else stretch.tolerance + 1
        count = None if stretch.expected is None else stretch.expected + more
        wave = _mono(file.blocks(stretch.start, count), channel, source)
    if more and len(wave) == count:
        raise AudioError(
            f"{source}: {len(wave) / rate_hz:.3f} s of audio or more, declared {duration_s} s",
            cause="longer_than_declared",
        )
    if len(wave) < stretch.promised:
        raise AudioError(
            f"{source}: {len(wave) / rate_hz:.3f} s of audio from {offset_s} s on, declared "
            f"{stretch.declared / rate_hz:.3f} s",
            cause="truncated" if len(wave) else "empty",
        )
    wave = check_samples(_fitted(wave, stretch), source, are_finite=file.is_integer)
    if sample_rate_hz is None or sample_rate_hz == rate_hz:
        return wave
    return check_samples(resample(wave, rate_hz, sample_rate_hz), source)


class AudioLength(NamedTuple):
    """How long a recording is."""

    samples: int
    """Per channel, at the file's own rate."""
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        """The same in seconds."""
        return self.samples / self.sample_rate_hz


def audio_length(source: str | Path | BufferedIOBase) -> AudioLength:
    """How many samples `read_audio` would read of a whole recording, and their rate.

    By the header where the last sample that it promises is there; else counted. Raises AudioError
    for a file that is missing or cannot be read.
    """
    with open_audio(source) as file:
        return AudioLength(file.length(), file.rate_hz)


class _Stretch(NamedTuple):
    """Which samples of a file to read."""

    start: int
    expected: int | None
    """None: all to the end."""
    declared: int
    promised: int
    """Fewer are an error."""
    tolerance: int
    is_padded: bool


def _stretch(file: AudioFile, offset_s: float, duration_s: float | None) -> _Stretch:
    start, expected = _samples(offset_s, file.rate_hz) or 0, _samples(duration_s, file.rate_hz)
    tolerance_s = DURATION_TOLERANCE_S
    if file.is_lossy and duration_s is not None:
        share_s = LOSSY_TOLERANCE_SHARE * duration_s
        tolerance_s = max(tolerance_s, min(LOSSY_TOLERANCE_S, share_s))
    tolerance = _samples(tolerance_s, file.rate_hz) or 0
    if expected is not None:
        is_padded = file.is_lossy
        return _Stretch(start, expected, expected, expected - tolerance, tolerance, is_padded)
    available = 0 if file.is_lossy else max((file.frames or 0) - start, 0)
    return _Stretch(start, None, available, available, tolerance, is_padded=False)


def _fitted(wave: np.ndarray, stretch: _Stretch) -> np.ndarray:
    """As many samples as are expected; a lossy file's are mirrored at its end, as in Lhotse."""
    if stretch.expected is None:
        return wave
    missing = stretch.expected - len(wave)
    if missing <= 0 or not stretch.is_padded or not len(wave):
        return wave[: stretch.expected]
    return np.pad(wave, (0, missing), mode="reflect" if len(wave) > 1 else "edge")


def check_samples(
    wave: np.ndarray, source: object = "audio", *, are_finite: bool = False
) -> Float[np.ndarray, " S"]:
    """Returns samples that are neither missing nor NaN, infinite or absurd; raises AudioError.

    `are_finite`: they are known to be none of these, as integers are.
    """
    if not len(wave):
        raise AudioError(f"{source}: no samples", cause="empty")
    if not are_finite and not -MAX_SAMPLE < wave.min() <= wave.max() < MAX_SAMPLE:  # nor NaN
        raise AudioError(
            f"{source}: NaN or infinite samples, or absurdly large ones", cause="not_finite"
        )
    return wave


def resampled_length(samples: int, from_hz: int, to_hz: int) -> int:
    """Samples of a recording after resampling, halves up as Lhotse counts them."""
    return (2 * samples * to_hz + from_hz) // (2 * from_hz)


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> Float[np.ndarray, " S2"]:
    """Changes the rate of `[S]` samples, by a Kaiser-windowed sinc in polyphase form.

    Gives `resampled_length` samples, bit for bit those of Lhotse where torchaudio is not installed.
    """
    if from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"sample rates must be positive, got {from_hz} and {to_hz} Hz")
    wave = np.ascontiguousarray(wave, np.float32)
    if from_hz == to_hz or not len(wave):
        return wave
    from scipy.signal import resample_poly

    gcd = math.gcd(from_hz, to_hz)
    up, down = to_hz // gcd, from_hz // gcd
    out = resample_poly(wave, up, down, window=_lowpass(max(up, down)))
    return out[: resampled_length(len(wave), from_hz, to_hz)]


@functools.lru_cache(maxsize=32)
def _lowpass(rate: int) -> np.ndarray:
    """The filter that `resample_poly` would design anew in each call, by the larger rate."""
    from scipy.signal import firwin

    window: Any = ("kaiser", _KAISER_BETA)
    taps = firwin(2 * FILTER_CROSSINGS * rate + 1, 1 / rate, window=window)
    return np.asarray(taps, np.float32)


def sinc_resample(wave: np.ndarray, from_hz: int, to_hz: int) -> Float[np.ndarray, " S2"]:
    """Changes the rate of `[S]` samples as torchaudio and NeMo do: ceil(S * to / from) samples.

    Band-limited interpolation (Smith, "Digital Audio Resampling"): a sinc whose cut-off lies a
    little below the lower of both Nyquist frequencies, under a Hann window of six zero crossings.
    """
    if from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"sample rates must be positive, got {from_hz} and {to_hz} Hz")
    wave = np.ascontiguousarray(wave, np.float32)
    if from_hz == to_hz or not len(wave):
        return wave
    gcd = math.gcd(from_hz, to_hz)
    step, phases = from_hz // gcd, to_hz // gcd
    if step <= _SMALL_STEP:
        return _in_blocks(wave, step, phases)
    weights = _sinc_weights(step, phases)
    taps = weights.shape[1]
    places = np.arange(-(-len(wave) * phases // step)) * step
    padded = np.pad(wave, (taps // 2 - 1, taps))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)[places // phases]
    return np.einsum("st,st->s", windows, weights[np.arange(len(places)) % phases])


def _in_blocks(wave: np.ndarray, step: int, phases: int) -> np.ndarray:
    """The same as one matmul: `step` input samples further on, all `phases` weights repeat."""
    kernel = _block_kernel(step, phases)
    taps = len(kernel) - step
    samples = -(-len(wave) * phases // step)
    blocks = -(-samples // phases)
    before, length = taps // 2 - 1, blocks * step + taps
    padded = np.pad(wave, (before, max(length - before - len(wave), 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel))[::step][:blocks]
    return (windows @ kernel).reshape(-1)[:samples]


@functools.lru_cache(maxsize=32)
def _block_kernel(step: int, phases: int) -> np.ndarray:
    """Weights [step + taps, phases] of a block of input samples for all outputs in it."""
    weights = _sinc_weights(step, phases)
    taps = weights.shape[1]
    kernel = np.zeros((step + taps, phases), np.float32)
    for phase in range(phases):
        first = phase * step // phases
        kernel[first : first + taps, phase] = weights[phase]
    return kernel


@functools.lru_cache(maxsize=32)
def _sinc_weights(step: int, phases: int) -> np.ndarray:
    """Weights [phases, taps] of the input samples around each of `phases` outputs.

    Output p lies p * step / phases input samples behind the first; its taps start at the
    (taps / 2 - 1)-th sample before it.
    """
    cutoff = _ROLLOFF * min(1.0, phases / step)  # of the input's band
    reach = math.ceil(_SINC_CROSSINGS / cutoff)
    behind = (np.arange(phases) * step % phases) / phases
    crossings = cutoff * (np.arange(-reach, reach + 2)[None] - behind[:, None])
    crossings = np.clip(crossings, -_SINC_CROSSINGS, _SINC_CROSSINGS)
    window = np.cos(crossings * np.pi / (2 * _SINC_CROSSINGS)) ** 2
    return (np.sinc(crossings) * window * cutoff).astype(np.float32)


def _samples(seconds: float | None, rate_hz: int) -> int | None:
    """Seconds as a count of samples, halves up; the inner rounding hides binary fractions."""
    return None if seconds is None else math.floor(round(seconds * rate_hz, 6) + 0.5)


def _mono(
    blocks: Iterable[np.ndarray], channel: int | None, source: object
) -> Float[np.ndarray, " S"]:
    """Joins blocks [n, C]: one channel, or the mean of all."""
    waves = [one_channel(block, channel, source) for block in blocks]
    return waves[0] if len(waves) == 1 else np.concatenate([np.zeros(0, np.float32), *waves])


def one_channel(block: np.ndarray, channel: int | None, source: object) -> np.ndarray:
    """One channel of a block [n, C], or the mean of all. Raises AudioError if it has none such."""
    if channel is None and block.shape[1] == 1:
        return block[:, 0]
    if channel is None:
        with np.errstate(over="ignore", invalid="ignore"):  # `check_samples` refuses what comes
            return block.mean(axis=1)
    if channel >= block.shape[1]:
        raise AudioError(
            f"{source}: channel {channel} asked of {block.shape[1]}", cause="no_such_channel"
        )
    return np.ascontiguousarray(block[:, channel])
