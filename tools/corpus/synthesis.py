"""Speaks a sentence with espeak-ng and puts it into a room, into noise or on the telephone.

Everything follows from the fields of an `Utterance`: the same fields on the same espeak-ng give the
same samples. Needs the program `espeak-ng` (tried with 1.51).
"""

import io
import subprocess
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import soundfile
from phonemes import speak
from scipy import signal

RATE_HZ = 16_000
ESPEAK_RATE_HZ = 22_050
WAV_HEADER_BYTES = 44
SPEECH_RMS = 0.07  # about -23 dB below full scale, before the utterance's own gain
PEAK = 0.89  # Opus overshoots a little; stay clear of full scale

ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-us-nyc",
    "en-029",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)
# Variants that sound like a person. Left out: whispering, croaking and robot voices, and f5 and
# Nguyen, whose spectral envelopes are nearest to those of the two voices kept for the test.
MALE_VARIANTS = tuple(
    "plain m1 m2 m3 m4 m5 m6 m8 Alex Denis Diogo Gene Mario Michael Mike antonio max pablo pedro "
    "quincy rob robert grandpa adam benjamin sandro".split()
)
FEMALE_VARIANTS = tuple(
    "f1 f3 f4 Annie Alicia Andrea anika aunty belinda linda steph grandma shelby".split()
)
TEST_VARIANTS = ("m7", "f2")


@dataclass(frozen=True, kw_only=True)
class Voice:
    """An English accent of espeak-ng spoken by one variant; `spec` is espeak-ng's `-v`."""

    name: str
    spec: str

    @property
    def variant(self) -> str:
        """The speaker without the accent, as in `f3` or `plain`."""
        return self.name.rsplit("_", 1)[1]


def make_voice(accent: str, variant: str) -> Voice:
    """Returns the `Voice` of a variant speaking an accent, named `accent_variant`."""
    spec = accent if variant == "plain" else f"{accent}+{variant}"
    return Voice(name=f"{accent}_{variant}", spec=spec)


# The training voices of the bundled corpus: every accent with one man and two women in turn.
VOICES = tuple(
    make_voice(accent, variant)
    for accent, variants in zip(
        ACCENTS,
        (
            ("plain", "f1", "m1", "Annie"),
            ("plain", "f3", "m2", "Andrea"),
            ("m3", "f4", "Alex"),
            ("m4", "aunty", "pedro"),
            ("m5", "linda", "quincy", "steph"),
            ("m6", "Alicia", "robert"),
            ("m8", "belinda", "max"),
            ("Mike", "anika", "grandpa", "grandma"),
        ),
        strict=True,
    )
    for variant in variants
)
# Every accent with every variant but those of the test: for training the encoder.
PRETRAINING_VOICES = tuple(
    make_voice(accent, variant)
    for accent in ACCENTS
    for variant in (*MALE_VARIANTS, *FEMALE_VARIANTS)
)
TEST_VOICES = (make_voice("en-us", "m7"), make_voice("en-gb", "f2"))

BABBLE_VOICES = VOICES[:6]
BABBLE_SENTENCES = (
    "our neighbor bought a brown horse and four sheep at the market",
    "the train was late again so we had tea at the station",
    "she told the children about a boat on the sea in winter",
    "put the rice and the onions in the pan and wait ten minutes",
)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What lies between mouth and recording.

    noise: "" (none), "white", "pink", "hum" or "babble", at `snr_db`.
    rt60_s: time in which the room's sound falls by 60 dB; 0 is no room.
    band: "" (all), "telephone" (300 to 3400 Hz) or "narrow" (below 4 kHz).
    opus_level: libsndfile's compression level of a pass through Opus (0.98 is about 14 kbit/s);
        0 is no pass.
    """

    noise: str = ""
    snr_db: float = 0.0
    rt60_s: float = 0.0
    band: str = ""
    opus_level: float = 0.0

    def __post_init__(self) -> None:
        """Refuses names that no function here knows."""
        if self.noise not in ("", *NOISES, "babble"):
            raise ValueError(f"noise={self.noise!r}; take one of {['', *NOISES, 'babble']}")
        if self.band not in ("", *BANDS):
            raise ValueError(f"band={self.band!r}; take one of {['', *BANDS]}")

    def __str__(self) -> str:
        """Names it for a manifest: `clean`, or as `pink_18dB+room_0.30s+telephone`."""
        parts = [
            f"{self.noise}_{self.snr_db:.0f}dB" if self.noise else "",
            f"room_{self.rt60_s:.2f}s" if self.rt60_s else "",
            self.band,
            f"opus_{self.opus_level:.3f}" if self.opus_level else "",
        ]
        return "+".join(part for part in parts if part) or "clean"


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One sentence to speak: who, how fast (words a minute), how high, how loud, and where.

    pitch: espeak-ng's, 0 to 99 around the voice's own height at 50.
    gain_db: over a root mean square of SPEECH_RMS, before clipping is avoided.
    seed: of the noise, the room and the silence around the speech.
    """

    text: str
    voice: Voice
    speed_wpm: int = 160
    pitch: int = 50
    gain_db: float = 0.0
    condition: Condition = field(default_factory=lambda: Condition())
    seed: int = 0


def synthesize(utterance: Utterance) -> np.ndarray:
    """Returns the utterance as float32 samples [S] at 16 kHz.

    Raises RuntimeError if espeak-ng is missing, refuses the voice or says nothing.
    """
    speech = espeak(utterance.text, utterance.voice.spec, utterance.speed_wpm, utterance.pitch)
    return record(speech, utterance)[0]


def synthesize_timed(utterance: Utterance) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Returns float32 samples [S] at 16 kHz, and (start in seconds, phoneme) in order.

    The samples sound as those of `synthesize`; their phases differ.
    """
    voice = utterance.voice.spec
    speech, rate_hz, phonemes = speak(utterance.text, voice, utterance.speed_wpm, utterance.pitch)
    assert rate_hz == ESPEAK_RATE_HZ
    wave, shift_s = record(signal.resample_poly(speech / 32768.0, 320, 441), utterance)
    return wave, [(round(start_s + shift_s, 3), name) for start_s, name in phonemes]


def recorded_at_s(utterance: Utterance) -> float:
    """Returns the second of `synthesize`'s recording at which espeak-ng begins the utterance."""
    speech = espeak(utterance.text, utterance.voice.spec, utterance.speed_wpm, utterance.pitch)
    return record(speech, utterance)[1]


def record(speech: np.ndarray, utterance: Utterance) -> tuple[np.ndarray, float]:
    """Puts speech [S] at 16 kHz where the utterance says.

    Returns the recording, and how many seconds later than in `speech` the speech begins there.
    """
    rng = np.random.default_rng(utterance.seed)
    wave, shift_s = _trim(speech, *rng.uniform(0.1, 0.2, 2))
    wave = wave * (SPEECH_RMS / _rms(wave))
    condition = utterance.condition
    if condition.rt60_s:
        wave = _reverberate(wave, condition.rt60_s, rng)
    if condition.noise:
        wave = _add_noise(wave, condition, rng)
    if condition.band:
        wave = signal.sosfilt(BANDS[condition.band], wave)
    wave = wave * 10 ** (utterance.gain_db / 20)
    wave = (wave * min(1.0, PEAK / np.abs(wave).max())).astype(np.float32)
    if condition.opus_level:
        wave = through_opus(wave, condition.opus_level)
    return wave, shift_s


def espeak(text: str, spec: str, speed_wpm: int, pitch: int) -> np.ndarray:
    """Returns what espeak-ng says, float64 samples [S] resampled from 22.05 to 16 kHz."""
    # -a 40: some variants clip at the usual amplitude of 100
    options = ["-v", spec, "-s", str(speed_wpm), "-p", str(pitch), "-a", "40"]
    try:
        done = subprocess.run(
            ["espeak-ng", *options, "--stdout", text], capture_output=True, check=False
        )
    except FileNotFoundError:
        raise RuntimeError("espeak-ng is missing; install it (Debian: espeak-ng)") from None
    samples = np.frombuffer(done.stdout[WAV_HEADER_BYTES:], "<i2")
    if done.returncode or not samples.any():
        raise RuntimeError(f"espeak-ng {options} said nothing: {done.stderr.decode().strip()}")
    return signal.resample_poly(samples / 32768.0, 320, 441)  # 22050 * 320 / 441 = 16000


def through_opus(wave: np.ndarray, level: float) -> np.ndarray:
    """Returns 16 kHz samples [S] as they come back from Opus; the level is libsndfile's, 0 to 1."""
    file = io.BytesIO()
    soundfile.write(file, wave, RATE_HZ, "OPUS", format="OGG", compression_level=level)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def espeak_version() -> str:
    """Returns espeak-ng's own version line, without its folders."""
    done = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split("Data at")[0].strip()


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave**2)))


def _trim(wave: np.ndarray, lead_s: float, tail_s: float) -> tuple[np.ndarray, float]:
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    speech, lead = wave[loud[0] : loud[-1] + 1], int(lead_s * RATE_HZ)
    return np.pad(speech, (lead, int(tail_s * RATE_HZ))), (lead - int(loud[0])) / RATE_HZ


def _reverberate(wave: np.ndarray, rt60_s: float, rng: np.random.Generator) -> np.ndarray:
    """Convolves with a direct path and an exponentially decaying tail of noise, 6 dB below it."""
    times = np.arange(int(rt60_s * RATE_HZ)) / RATE_HZ
    tail = rng.standard_normal(times.size) * 10 ** (-3 * times / rt60_s)
    tail[: RATE_HZ // 500] = 0  # the first reflection comes 2 ms after the direct sound
    tail *= 0.5 / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    wet = signal.fftconvolve(wave, tail)[: wave.size]
    return wet * (_rms(wave) / _rms(wet))


def _add_noise(wave: np.ndarray, condition: Condition, rng: np.random.Generator) -> np.ndarray:
    make = _babble if condition.noise == "babble" else NOISES[condition.noise]
    noise = make(wave.size, rng)
    return wave + noise * (_rms(wave) / _rms(noise) / 10 ** (condition.snr_db / 20))


def _white(samples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(samples)


def _pink(samples: int, rng: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    bins = np.maximum(np.arange(spectrum.size), samples * 30 // RATE_HZ)  # flat below 30 Hz
    return np.fft.irfft(spectrum / np.sqrt(bins), samples)


def _hum(samples: int, rng: np.random.Generator) -> np.ndarray:
    times = np.arange(samples) / RATE_HZ
    mains_hz = rng.choice([50.0, 60.0])
    phases = rng.uniform(0, 2 * np.pi, 6)
    tones = [
        np.sin(2 * np.pi * mains_hz * (k + 1) * times + phase) / (k + 1)
        for k, phase in enumerate(phases)
    ]
    return np.sum(tones, axis=0) + 0.05 * rng.standard_normal(samples)


def _babble(samples: int, rng: np.random.Generator) -> np.ndarray:
    total = np.zeros(samples)
    for voice in rng.choice(len(BABBLE_VOICES), 3, replace=False):
        clip = _babble_clip(int(voice), int(rng.integers(len(BABBLE_SENTENCES))))
        start = int(rng.integers(clip.size))
        total += np.resize(np.roll(clip, -start), samples)
    return total


@cache
def _babble_clip(voice: int, sentence: int) -> np.ndarray:
    clip = espeak(BABBLE_SENTENCES[sentence], BABBLE_VOICES[voice].spec, 170, 50)
    return clip / _rms(clip)


NOISES = {"white": _white, "pink": _pink, "hum": _hum}
BANDS = {
    "telephone": signal.butter(4, (300, 3400), "bandpass", fs=RATE_HZ, output="sos"),
    "narrow": signal.butter(8, 3900, "lowpass", fs=RATE_HZ, output="sos"),
}
