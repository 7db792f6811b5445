"""Mixes noise into the recordings of an evaluation, at a given signal-to-noise ratio."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import read_audio
from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.evaluation.dialogs import joined
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.settings import SettingsError

WHITE = "white"
Read = Callable[[int], np.ndarray]


def add_noise(utterances: Sequence[Utterance], noise: str, snr_db: float) -> list[Utterance]:
    """Gives every utterance the same recording with noise, `snr_db` decibels below its power.

    `noise` is a recording, of which each utterance has a stretch that its id chooses, or `white`:
    Gaussian noise. Powers are means over the whole recording, as in Lhotse's mixer. A recording of
    digital silence stays silent. Each recording of a conversation has noise of its own. Raises
    SettingsError for noise that cannot be read.
    """
    noises = None if noise == WHITE else _opened(noise)
    return [_noisy(utterance, noises, noise, snr_db) for utterance in utterances]


def _opened(noise: str) -> Callable[[int], np.ndarray]:
    """Sampling rate in Hz -> the samples of a recording of noise, read once."""
    path = Path(noise)
    if not path.is_file():
        raise SettingsError(f"noise: {noise} is no file; name a recording, or {WHITE}")
    try:
        if not np.any(read_audio(path)):
            raise SettingsError(f"noise: {noise} is silent")
    except AudioError as error:
        raise SettingsError(f"noise: {error}") from error
    return functools.lru_cache(lambda rate_hz: read_audio(path, sample_rate_hz=rate_hz))


def _noisy(utterance: Utterance, noises: Read | None, name: str, snr_db: float) -> Utterance:
    seed = int.from_bytes(hashlib.sha256(utterance.id.encode()).digest()[:8], "big")

    def noisy(wave: np.ndarray, rate_hz: int, number: int = 0) -> np.ndarray:
        generator = np.random.default_rng([seed, number] if number else seed)
        if noises is None:
            piece = generator.standard_normal(len(wave)).astype(np.float32)
        else:
            piece = _stretch(noises(rate_hz), len(wave), generator)
        return mix(wave, piece, snr_db)

    source = f"{utterance.source} + {name} {snr_db:g} dB"
    if utterance.dialog is None:
        return replace(utterance, read=lambda hz: noisy(utterance.read(hz), hz), source=source)
    dialog = replace(utterance.dialog, process=noisy)
    return replace(utterance, dialog=dialog, read=lambda hz: joined(dialog.read(hz)), source=source)


def _stretch(noise: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """A stretch from a random place on; the recording is repeated where it ends."""
    start = int(generator.integers(len(noise)))
    return np.resize(np.roll(noise, -start), samples)


def mix(
    wave: Float[np.ndarray, " S"], noise: Float[np.ndarray, " S"], snr_db: float
) -> Float[np.ndarray, " S"]:
    """Speech plus noise whose power is `snr_db` decibels below that of the speech."""
    powers = [float(np.mean(np.square(one, dtype=np.float64))) for one in (wave, noise)]
    if not all(powers):
        return wave
    gain = np.sqrt(powers[0] / powers[1] * 10 ** (-snr_db / 10))
    return (wave + gain * noise).astype(np.float32)
