"""Waveforms on the host: reading files, resampling, and the checks that a recording must pass.

Everything is float32 mono `[S]`, and needs soundfile and SciPy only, so that answering from files
works without Lhotse.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

DURATION_TOLERANCE_S = 0.1
"""How far a file may be from its declared duration: manifests round to one or two digits."""
_KAISER_BETA = 5.0
_FILTER_CROSSINGS = 10
"""Zero crossings of the sinc on each side of the resampling filter, and its window: SciPy's."""

_SINC_CROSSINGS = 6
_ROLLOFF = 0.99
"""torchaudio's defaults: zero crossings on each side, and the share of the band that is kept."""

CAUSES = {
    "missing": "the file does not exist",
    "unreadable": "the file cannot be decoded",
    "empty": "there are no samples",
    "not_finite": "a sample is NaN or infinite",
    "truncated": "the file ends before its declared duration",
    "longer_than_declared": "the file is longer than its declared duration",
    "no_such_channel": "the file has no such channel",
    "longer_than_model": "it lasts more frames than the model has positions",
}


class AudioError(ValueError):
    """A recording that cannot be used; `cause` is a key of CAUSES, for counting."""

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


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
        source: a file that libsndfile can read, or one opened in binary mode.
        sample_rate_hz: resample to this rate; None keeps the file's.
        offset_s: where to start, in seconds.
        duration_s: how much to read; None reads to the end.
        channel: which channel, from 0; None is the mean of all.
        is_segment: whether more than `duration_s` may follow. If not, `duration_s` describes the
            whole file, and a file longer by more than DURATION_TOLERANCE_S is refused.

    Raises:
        AudioError: for a recording that cannot be used, with its cause.
    """
    with _opened(source) as file:
        rate_hz = file.samplerate
        expected = _samples(duration_s, rate_hz)
        start = min(_samples(offset_s, rate_hz) or 0, file.frames)
        available = file.frames - start
        tolerance = _samples(DURATION_TOLERANCE_S, rate_hz) or 0
        if not is_segment and expected is not None and available > expected + tolerance:
            raise AudioError(
                f"{source}: {available / rate_hz:.3f} s of audio, declared {duration_s} s",
                cause="longer_than_declared",
            )
        if start:
            file.seek(start)
        wave = file.read(available if expected is None else expected, dtype="float32")
    promised = available if expected is None else expected - tolerance
    if len(wave) < promised:
        raise AudioError(
            f"{source}: {len(wave) / rate_hz:.3f} s of audio from {offset_s} s on, declared "
            f"{(available if expected is None else expected) / rate_hz:.3f} s",
            cause="truncated" if len(wave) else "empty",
        )
    wave = check_samples(_mono(wave, channel, source), source)
    if sample_rate_hz is None or sample_rate_hz == rate_hz:
        return wave
    return check_samples(resample(wave, rate_hz, sample_rate_hz), source)


def check_samples(wave: np.ndarray, source: object = "audio") -> Float[np.ndarray, " S"]:
    """Returns samples that are neither missing nor NaN nor infinite; raises AudioError."""
    if not len(wave):
        raise AudioError(f"{source}: no samples", cause="empty")
    if not np.isfinite(wave).all():
        raise AudioError(f"{source}: NaN or infinite samples", cause="not_finite")
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
    taps = firwin(2 * _FILTER_CROSSINGS * rate + 1, 1 / rate, window=window)
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
    weights = _sinc_weights(step, phases)
    taps = weights.shape[1]
    places = np.arange(-(-len(wave) * phases // step)) * step
    padded = np.pad(wave, (taps // 2 - 1, taps))
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)[places // phases]
    return np.einsum("st,st->s", windows, weights[np.arange(len(places)) % phases])


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


def _mono(wave: np.ndarray, channel: int | None, source: object) -> np.ndarray:
    if wave.ndim == 1:
        wave = wave[:, None]
    if channel is None:
        return wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    if channel >= wave.shape[1]:
        raise AudioError(
            f"{source}: channel {channel} asked of {wave.shape[1]}", cause="no_such_channel"
        )
    return np.ascontiguousarray(wave[:, channel])


@contextmanager
def _opened(source: str | Path | BufferedIOBase) -> Iterator:
    """A soundfile, with its errors told as AudioError."""
    import soundfile

    if isinstance(source, str | Path) and not Path(source).is_file():
        raise AudioError(f"{source}: no such file", cause="missing")
    anything: Any = source  # soundfile's own annotation leaves out open files
    try:
        with soundfile.SoundFile(anything) as file:
            yield file
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a headerless format
        raise AudioError(f"{source}: {error}", cause="unreadable") from error
