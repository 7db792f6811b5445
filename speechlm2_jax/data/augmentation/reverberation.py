"""Reverberation by recorded or simulated room impulse responses."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.augmentation.effects import Draw, Wave, fitted
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import Finder, local_file
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import SettingsError

SOUND_M_PER_S = 340.0
T60_S = (0.1, 0.8)
"""Seconds in which a simulated room's sound decays by 60 dB."""
ROOM_M = (0.1, 1.2)
"""Volume over surface of a simulated room."""
DISTANCE_M = (0.2, 12.0)
"""Between speaker and microphone."""
REFLECTIONS_PER_S = 2
"""Reflections of a simulated response, per sample of a second."""
_OVERSAMPLING = 64
"""Arrivals fall between samples: they are placed at so many times the rate."""
_STAGE = 8
_HIGHPASS_HZ = 80.0
_DISTANCE_POWER, _NEAREST_WEIGHT = 2.0, 0.25
_JITTER, _JITTER_POWER = 2.0, 0.2


@dataclass(frozen=True, kw_only=True)
class Reverberation:
    """Convolves with an impulse response and keeps level and timing, as Lhotse does."""

    probability: float
    responses: Sequence[Any]
    """Lhotse recordings to choose from; none: they are simulated."""

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The reverberating samples; the same where the response cannot be read."""
        if draw.rng.random() >= self.probability:
            return wave
        if not self.responses:
            return reverberate(wave, simulated_response(rate_hz, draw.rng))
        recording = self.responses[int(draw.rng.integers(len(self.responses)))]
        try:
            return reverberate(wave, _first_channel(recording, rate_hz))
        except AudioError as error:
            draw.report(error)
            return wave


def reverberate(wave: Wave, response: Float[np.ndarray, " R"]) -> Wave:
    """Convolves; the strongest part of the response comes without delay, and the power stays.

    As Lhotse's ReverbWithImpulseResponse, whose convolution takes ten times as long.
    """
    from scipy.signal import oaconvolve

    start = int(np.argmax(response))
    wet = oaconvolve(wave, response)[start : start + len(wave)]
    before, after = (float(np.mean(np.square(w, dtype=np.float64))) for w in (wave, wet))
    return fitted(wet * np.float32(np.sqrt(before / after)) if after > 0 else wet, wave)


def read_responses(path: str) -> tuple[Any, ...]:
    """The impulse responses of a Lhotse manifest of recordings, their paths absolute.

    Raises SettingsError for a file that is missing, damaged or empty, or that settings do not
    allow, and for recordings that commands make.
    """
    from lhotse import RecordingSet

    with located("rir_path"):
        file = local_file(path)
    finder = Finder(file)
    try:
        recordings = list(RecordingSet.from_file(file))
    except Exception as error:  # Lhotse raises whatever a wrong file makes it raise
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"{file}: not a Lhotse manifest of recordings ({reason})") from error
    if not recordings:
        raise SettingsError(f"{file}: holds no recording")
    for recording in recordings:
        for source in recording.sources:
            if source.type in ("url", "command"):
                message = f"{recording.id} is read from a {source.type}; copy it to a local disk"
                raise SettingsError(f"{file}: {message}")
            if source.type == "file":
                source.source = finder(str(source.source))
                if is_remote(source.source):
                    raise SettingsError(f"{file}: {source.source}: copy it to a local disk")
    return tuple(recordings)


@functools.lru_cache(maxsize=256)
def _read(recording: "_Hashed", rate_hz: int) -> np.ndarray:
    try:
        return recording.value.resample(rate_hz).load_audio()[0]
    except Exception as error:  # Lhotse raises many kinds, all of which mean: no audio
        reason = " ".join(str(error).split())[:200]
        message, path = f"{recording.value.id}: {reason}", str(recording.value.sources[0].source)
        raise AudioError(message, cause="unreadable", path=path) from error


@dataclass(frozen=True)
class _Hashed:
    """A recording of Lhotse, which has no hash of its own."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and other.value is self.value


def _first_channel(recording: Any, rate_hz: int) -> np.ndarray:
    return _read(_Hashed(recording), rate_hz)


def simulated_response(rate_hz: int, rng: np.random.Generator) -> Float[np.ndarray, " R"]:
    """A random room's impulse response.

    FRA-RIR (Luo and Yu, arXiv 2208.04101): the reflections of the image-source method, their
    distances and numbers of bounces drawn at random. With a decay time T, a ratio R of volume to
    surface and a distance d of the speaker:

    - a wall reflects r = sqrt(1 - (1 - exp(-0.16 R / T))^2) of the amplitude (Eyring);
    - a reflection travels x in [d, v T - d], the density rising with its square;
    - it bounces g = (x / (v T))^2 (g_most - 1) + 1 times, and a random number more or less; at
      g_most = (log10(v T) - log10(d) - 3) / log10(r) bounces it is 60 dB below the direct sound;
    - it arrives at x / v with the amplitude r^g / x.
    """
    t60_s, room_m = rng.uniform(*T60_S), rng.uniform(*ROOM_M)
    distance_m = rng.uniform(*DISTANCE_M)
    reach_m = SOUND_M_PER_S * t60_s
    reflect = np.sqrt(1 - (1 - np.exp(-0.16 * room_m / t60_s)) ** 2)
    count = REFLECTIONS_PER_S * rate_hz
    ratios = np.linspace(1.0, reach_m / distance_m - 1, count)
    weights = np.cumsum(np.linspace(_NEAREST_WEIGHT, 1.0, count) ** _DISTANCE_POWER)
    ratio = ratios[np.searchsorted(weights, rng.uniform(0, weights[-1], count))]
    travelled_m = distance_m * ratio
    most = (np.log10(reach_m) - np.log10(distance_m) - 3) / np.log10(reflect)
    bounces = (travelled_m / reach_m) ** 2 * (most - 1) + 1
    bounces += rng.uniform(-_JITTER, _JITTER, count) * ratio**_JITTER_POWER
    amplitude = reflect ** np.maximum(bounces, 1.0) / travelled_m
    return _sampled(
        np.append(travelled_m, distance_m) / SOUND_M_PER_S,
        np.append(amplitude, 1 / distance_m),
        t60_s,
        rate_hz,
    )


def _sampled(
    arrival_s: np.ndarray, amplitude: np.ndarray, length_s: float, rate_hz: int
) -> np.ndarray:
    """Pulses at their times as samples, without the lowest frequencies."""
    from scipy.signal import butter, resample_poly, sosfilt

    fine_hz = _OVERSAMPLING * rate_hz
    length = int(np.ceil(length_s * fine_hz))
    places = np.minimum(np.ceil(arrival_s * fine_hz).astype(np.int64), length - 1)
    pulses = np.bincount(places, amplitude, minlength=length)
    coarse = resample_poly(pulses, 1, _STAGE)
    sections = butter(2, _HIGHPASS_HZ, "highpass", fs=fine_hz // _STAGE, output="sos")
    filtered = sosfilt(sections, coarse)
    return resample_poly(filtered, 1, _OVERSAMPLING // _STAGE).astype(np.float32)
