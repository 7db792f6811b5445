"""Speech of the bundled dialogs: who speaks it, and the files that conversations take it from.

All utterances of a voice lie in one Ogg/Opus file, one after another, as a file of its own for each
would be half header. A `Stretch` names one of them.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import natural_voices
import numpy as np
from dialog_texts import TEST, TRAIN, VALIDATION
from ogg import write_opus
from synthesis import NOISES, RATE_HZ, Condition, Utterance, Voice, espeak, make_voice, record

FRAME = 1280
"""Samples of a frame of 80 ms."""
STEP = RATE_HZ // 100
"""Samples of 10 ms, of which every utterance has a whole number."""
GAP = FRAME
"""Samples between two utterances of a file."""
LEAD, TAIL = RATE_HZ // 50, RATE_HZ // 20
"""Samples of an utterance before and after its speech."""
QUIET = 0.02
"""Of the peak: speech begins and ends above it."""
ROOM_SHARE = 0.3
FADE = RATE_HZ // 25
NOISE_S = 24.0
USER_LEVEL, AGENT_LEVEL, NOISE_LEVEL = 0.985, 0.93, 0.99
"""libsndfile's compression levels: about 10, 24 and 8 kbit/s."""
AGENT, AGENT_SPEED = natural_voices.VOICES[0], 0.85
NATURAL = {voice.label: voice for voice in natural_voices.VOICES}
USERS = {
    TRAIN: (
        *("rhvoice_alan", "rhvoice_bdl", "rhvoice_clb", "flite_rms", "flite_kal16"),
        *("festival_ked", "pico_us", "en-us_plain", "en-us_f1", "en-us_Annie", "en-gb_m2"),
        *("en-gb_f3", "en-gb-scotland_m3", "en-gb-x-rp_aunty", "en-gb-x-rp_pedro"),
        *("en-us-nyc_linda", "en-us-nyc_m5", "en-us-nyc_steph"),
    ),
    VALIDATION: ("pico_gb", "en-gb-scotland_Gene", "en-029_shelby"),
    TEST: ("rhvoice_slt", "flite_awb", "en-us_m7", "en-gb_f2"),
}
"""Voices of the user by split. The last two of the test are in nothing that this project trains."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """An utterance in a file: where it is, and where its speech is (samples)."""

    tape: "Tape"
    start: int
    samples: int
    lead: int = 0
    tail: int = 0

    @property
    def speech(self) -> int:
        """Samples of the speech alone."""
        return self.samples - self.lead - self.tail


@dataclass
class Tape:
    """One recording of many utterances."""

    path: Path
    level: float
    samples: int = 0
    _waves: list[np.ndarray] = field(default_factory=list)

    def add(self, wave: np.ndarray, lead: int = 0, tail: int = 0) -> Stretch:
        """Appends an utterance, at a whole frame: samples [S] of which lead and tail are silent."""
        found = Stretch(tape=self, start=self.samples, samples=len(wave), lead=lead, tail=tail)
        length = FRAME * -(-(len(wave) + GAP) // FRAME)
        self._waves.append(np.pad(wave, (0, length - len(wave))))
        self.samples += length
        return found

    def write(self) -> None:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_opus(self.path, np.concatenate(self._waves), RATE_HZ, self.level)

    def recording(self, folder: Path) -> Any:
        """The Lhotse recording, its path relative to a folder."""
        from lhotse import Recording
        from lhotse.audio import AudioSource

        source = Path(os.path.relpath(self.path, folder)).as_posix()
        return Recording(
            id=self.path.stem,
            sources=[AudioSource(type="file", channels=[0], source=source)],
            sampling_rate=RATE_HZ,
            num_samples=self.samples,
            duration=self.samples / RATE_HZ,
        )


def speak(text: str, label: str, rng: np.random.Generator, *, has_room: bool) -> np.ndarray:
    """A user's utterance, in a room or not: samples [S], of which LEAD and TAIL are silent.

    Raises RuntimeError as the synthesizers do.
    """
    is_natural = label in NATURAL
    voice = Voice(name=label, spec="") if is_natural else make_voice(*label.split("_"))
    if is_natural:
        speed = round(float(rng.uniform(0.9, 1.15)), 2)
        speech = natural_voices.synthesize(text, NATURAL[label], speed=speed)
    else:
        speech = espeak(text, voice.spec, int(rng.integers(130, 186)), int(rng.integers(38, 63)))
    utterance = Utterance(
        text=text,
        voice=voice,
        gain_db=round(float(rng.uniform(-7, 3)), 1),
        condition=Condition(rt60_s=round(float(rng.uniform(0.15, 0.45)), 2) if has_room else 0.0),
        seed=int(rng.integers(2**31)),
    )
    return _cut(record(speech, utterance)[0])


def _cut(wave: np.ndarray) -> np.ndarray:
    """The speech of a recording with LEAD before and TAIL after it, faded in and out."""
    loud = np.flatnonzero(np.abs(wave) > QUIET * np.abs(wave).max())
    start, end = loud[0] - LEAD, loud[-1] + 1 + TAIL
    padded = np.pad(wave, (max(-start, 0), max(end - len(wave), 0)))
    found = padded[max(start, 0) :][: end - start].astype(np.float32)
    found[:LEAD] *= np.linspace(0, 1, LEAD)
    found[-TAIL:] *= np.linspace(1, 0, TAIL)
    return np.pad(found, (0, -len(found) % STEP))


def agent_speech(text: str) -> np.ndarray:
    """The agent's response: whole frames of samples, from the beginning of its speech on."""
    wave = natural_voices.synthesize(text, AGENT, speed=AGENT_SPEED)
    clean = Utterance(text=text, voice=Voice(name=AGENT.label, spec=""))
    speech = _cut(record(wave, clean)[0])
    return np.pad(speech, (0, -len(speech) % FRAME))


def stopped(wave: np.ndarray, frames: int) -> np.ndarray:
    """The first frames of a response, faded out."""
    cut = wave[: frames * FRAME].copy()
    cut[-FADE:] *= np.linspace(1, 0, FADE)
    return cut


def noise(kind: str, rng: np.random.Generator) -> np.ndarray:
    """NOISE_S of one of NOISES, which conversations mix in as loud as they like."""
    wave = NOISES[kind](int(NOISE_S * RATE_HZ), rng)
    return (0.1 * wave / np.sqrt(np.mean(wave**2))).clip(-1, 1).astype(np.float32)
