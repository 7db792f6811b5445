"""Noise: which recordings there are, and how stretches of them are mixed into speech."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.augmentation.config import Interval
from speechlm2_jax.data.augmentation.effects import Draw, Wave
from speechlm2_jax.data.conversations import AudioClip

MOST_DRAWS = 200
"""Recordings of noise that are drawn for one of speech."""
MOST_FAILURES = 3
"""Recordings of noise that may fail before the rest of the speech stays clean."""


@dataclass(frozen=True, kw_only=True)
class NoiseSource:
    """Recordings of one source of noise."""

    clips: Sequence[AudioClip]
    share: float
    """Its chance, in proportion to that of the other sources."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Mixes noise into speech at a random ratio of their powers, as Lhotse's CutSet.mix."""

    probability: float
    snr_db: Interval
    sources: Sequence[NoiseSource]

    def __call__(self, wave: Wave, rate_hz: int, draw: Draw) -> Wave:
        """The noisy samples; another recording takes the place of noise that cannot be read."""
        if draw.rng.random() >= self.probability:
            return wave
        snr_db = draw.rng.uniform(*self.snr_db)
        return mixed(wave, rate_hz, self._pieces(len(wave), rate_hz, draw), snr_db)

    def _pieces(self, samples: int, rate_hz: int, draw: Draw) -> list[Wave]:
        """Stretches of noise that together cover so many samples."""
        pieces: list[Wave] = []
        failed: set[tuple[str, str]] = set()
        for _ in range(MOST_DRAWS):
            if samples <= 0 or len(failed) == MOST_FAILURES:
                break
            clip = self._stretch(samples / rate_hz, draw.rng)
            if (clip.id, clip.path) in failed:
                continue
            try:
                piece = clip.load(rate_hz)[:samples]
            except AudioError as error:
                failed.add((clip.id, clip.path))
                draw.report(error)
                continue
            pieces.append(piece)
            samples -= len(piece)
        return pieces

    def _stretch(self, seconds: float, rng: np.random.Generator) -> AudioClip:
        """A random recording, or a random stretch of one that is longer than needed."""
        shares = np.cumsum([source.share for source in self.sources])
        chosen = int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))
        source = self.sources[chosen]
        clip = source.clips[int(rng.integers(len(source.clips)))]
        # drawn for short recordings too, so that their number alone moves the generator
        place = rng.random()
        room_s = clip.duration_s - seconds
        return clip if room_s <= 0 else clip.stretch(place * room_s, seconds)


def mixed(wave: Wave, rate_hz: int, pieces: Sequence[Wave], snr_db: float) -> Wave:
    """Adds noise, piece after piece, each so many decibels below the speech."""
    from lhotse.audio.mixer import AudioMixer

    mixer, start = AudioMixer(wave[None], rate_hz), 0
    for piece in pieces:
        mixer.add_to_mix(piece[None], snr=snr_db, offset=start / rate_hz)
        start += len(piece)
    return mixer.mixed_audio[0][: len(wave)].astype(np.float32, copy=False)
