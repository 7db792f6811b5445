"""All random effects of a data set, and those of one example in one epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.augmentation.config import AugmentationConfig, interval
from speechlm2_jax.data.augmentation.effects import (
    Clipping,
    Compression,
    Draw,
    Effect,
    Lowpass,
    Volume,
    Wave,
)
from speechlm2_jax.data.augmentation.noise import Noise, NoiseSource
from speechlm2_jax.data.augmentation.reverberation import Reverberation, read_responses

_PURPOSE = 1000
"""With the seed, tells these generators from those that plan batches."""
_PLACE, _NOISE, _VOLUME, _LOWPASS, _CLIPPING, _REVERBERATION, _COMPRESSION = range(7)
"""Each effect has a generator of its own: switching one on changes no other."""

Numbered = tuple[int, Effect]
Report = Callable[[AudioError], None]


def unreported(error: AudioError) -> None:
    """Nobody asks."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The random effects of one data set."""

    seed: int
    before_speed: tuple[Numbered, ...] = ()
    """On what was read."""
    after_padding: tuple[Numbered, ...] = ()
    """On what the model gets."""
    on_agent: tuple[Numbered, ...] = ()
    """On the agent's recording of duplex data."""

    def of_example(self, *key: int, report: Report = unreported) -> "ExampleEffects":
        """The effects on an example; the key is its epoch, batch and index.

        `report` is told of noise, and of impulse responses, that cannot be read.
        """
        return ExampleEffects(augmentation=self, key=key, report=report)


@dataclass(frozen=True, kw_only=True)
class ExampleEffects:
    """The random effects on one example in one epoch."""

    augmentation: Augmentation
    key: tuple[int, ...]
    report: Report

    def before_joining(self) -> "ExampleEffects":
        """Those that come before recordings are joined."""
        return replace(self, augmentation=replace(self.augmentation, after_padding=()))

    def of_clip(self, number: int) -> "ClipEffects":
        """Those on one of its recordings."""
        own = self.augmentation
        return ClipEffects(
            key=(own.seed, _PURPOSE, *self.key, number),
            before_speed=own.before_speed,
            after_padding=own.after_padding,
            report=self.report,
        )

    def of_agent(self) -> "ClipEffects":
        """Those on the agent's recording, drawn as for the user's (clip 0)."""
        own = self.augmentation
        return ClipEffects(
            key=(own.seed, _PURPOSE, *self.key, 0),
            before_speed=(),
            after_padding=own.on_agent,
            report=self.report,
        )


@dataclass(frozen=True, kw_only=True)
class ClipEffects:
    """The random effects on one recording."""

    key: tuple[int, ...]
    before_speed: tuple[Numbered, ...]
    after_padding: tuple[Numbered, ...]
    report: Report

    def place(self) -> float:
        """A random share, from 0 to 1: where a stretch begins, or silence goes."""
        return float(self._rng(_PLACE).random())

    def on_source(self, wave: Wave, rate_hz: int) -> Wave:
        """Changes what was read, before its speed and length change."""
        return self._apply(self.before_speed, wave, rate_hz)

    def on_result(self, wave: Wave, rate_hz: int) -> Wave:
        """Changes what the model gets."""
        return self._apply(self.after_padding, wave, rate_hz)

    def _apply(self, effects: Sequence[Numbered], wave: Wave, rate_hz: int) -> Wave:
        for number, effect in effects:
            wave = effect(wave, rate_hz, Draw(rng=self._rng(number), report=self.report))
        return wave

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([*self.key, number])


def make_augmentation(
    config: AugmentationConfig, seed: int, noise: Sequence[NoiseSource] = ()
) -> Augmentation | None:
    """The effects that a data set asks for; None if there are none.

    Raises SettingsError for a bad `rir_path`.
    """
    before: list[Numbered] = []
    if noise:
        snr_db = interval(config.noise_snr)
        mix = Noise(probability=config.noise_mix_prob, snr_db=snr_db, sources=noise)
        before.append((_NOISE, mix))
    after = _sound_effects(config)
    reaches_agent = config.compression_enable_for_custom_fields
    draws_places = "random" in (
        config.truncate_duration and config.truncate_offset_type,
        config.pad_min_duration and config.pad_direction,
    )
    if not (before or after or draws_places):
        return None
    return Augmentation(
        seed=seed,
        before_speed=tuple(before),
        after_padding=tuple(after),
        on_agent=tuple(one for one in after if reaches_agent and one[0] == _COMPRESSION),
    )


def _sound_effects(config: AugmentationConfig) -> list[Numbered]:
    """Those that follow all changes of length, in NeMo's order."""
    effects: list[Numbered] = []
    if config.perturb_volume:
        volume = Volume(probability=config.volume_prob, factor=config.volume_interval)
        effects.append((_VOLUME, volume))
    if config.lowpass_enabled:
        cutoff_hz = config.lowpass_frequencies_interval
        effects.append((_LOWPASS, Lowpass(probability=config.lowpass_prob, cutoff_hz=cutoff_hz)))
    if config.clipping_enabled:
        clipping = Clipping(
            probability=config.clipping_prob,
            probability_hard=config.clipping_prob_hard,
            gain_db=interval(config.clipping_gain_db),
            normalize=config.clipping_normalize,
            oversampling=config.clipping_oversampling,
        )
        effects.append((_CLIPPING, clipping))
    if config.rir_enabled:
        responses = () if config.rir_path is None else read_responses(config.rir_path)
        reverberation = Reverberation(probability=config.rir_prob, responses=responses)
        effects.append((_REVERBERATION, reverberation))
    if config.compression_enabled:
        compression = Compression(
            probability=config.compression_prob,
            level=config.compression_level_interval,
            codecs=config.compression_codecs,
            weights=config.compression_codec_weights,
        )
        effects.append((_COMPRESSION, compression))
    return effects
