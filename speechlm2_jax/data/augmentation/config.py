"""Settings of augmentation: NeMo's keys, in the order in which they take effect."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

_log = logging.getLogger(__name__)

Interval = tuple[float, float]
Codec = Literal["opus", "mp3", "vorbis", "gsm"]

SWITCHES: Mapping[str, Sequence[str]] = {
    "noise_path": ("noise_snr", "noise_mix_prob"),
    "truncate_duration": ("truncate_offset_type",),
    "cut_into_windows_duration": ("cut_into_windows_hop",),
    "pad_min_duration": ("pad_direction",),
    "perturb_volume": ("volume_interval", "volume_prob"),
    "lowpass_enabled": ("lowpass_frequencies_interval", "lowpass_prob"),
    "clipping_enabled": (
        "clipping_gain_db",
        "clipping_normalize",
        "clipping_oversampling",
        "clipping_prob_hard",
        "clipping_prob",
    ),
    "rir_enabled": ("rir_path", "rir_prob"),
    "compression_enabled": (
        "compression_prob",
        "compression_level_interval",
        "compression_codecs",
        "compression_codec_weights",
        "compression_enable_for_custom_fields",
    ),
    "concatenate_samples": (
        "concatenate_gap_seconds",
        "concatenate_duration_factor",
        "db_norm",
    ),
}
"""Key that switches something on -> keys that only configure it."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Keys of augmentation of one stream, for every kind of data."""

    # noise
    noise_path: str | Mapping[str, object] | None = None
    """Recordings of noise: a manifest, a folder of SHAR, a YAML file of entries, or keys of a
    source (`manifest_filepath`, `cuts_path`, `shar_path`, `input_cfg`)."""
    noise_snr: float | Interval = (10.0, 20.0)
    """Decibels between speech and noise: a number, or an interval."""
    noise_mix_prob: float = 0.5
    """Share of the recordings that get noise."""
    # length: decided before anything is read
    truncate_duration: float | None = None
    """Seconds at which longer recordings are cut off."""
    truncate_offset_type: Literal["random", "start", "end"] = "random"
    """Where the stretch begins that is kept; `random` draws it anew in each epoch."""
    cut_into_windows_duration: float | None = None
    """Seconds of the windows that recordings are cut into; each is an example of its own."""
    cut_into_windows_hop: float | None = None
    """Seconds from window to window; null: no overlap."""
    keep_excessive_supervisions: bool = True
    """Whether a text stays with a stretch that it reaches beyond."""
    pad_min_duration: float | None = None
    """Seconds to which shorter recordings are padded with silence."""
    pad_direction: Literal["right", "left", "both", "random"] = "right"
    """Where the silence goes; `random` draws its share before the recording."""
    # sound
    perturb_volume: bool = False
    """Multiplies samples by a random factor (not a key of NeMo; Lhotse's PerturbVolume)."""
    volume_interval: Interval = (0.125, 2.0)
    """Factors of `perturb_volume`, drawn uniformly."""
    volume_prob: float = 0.5
    """Share of the recordings whose volume changes."""
    lowpass_enabled: bool = False
    """Removes high frequencies, by resampling to a lower rate and back."""
    lowpass_frequencies_interval: Interval = (3500.0, 8000.0)
    """Hertz of the highest frequency left, drawn uniformly on a logarithmic scale."""
    lowpass_prob: float = 0.5
    """Share of the recordings that are filtered."""
    clipping_enabled: bool = False
    """Amplifies and saturates, as an overdriven microphone."""
    clipping_gain_db: float | Interval = (0.0, 24.0)
    """Decibels of gain before saturation, taken back after it."""
    clipping_normalize: bool = True
    """Whether the gain is relative to the loudest sample."""
    clipping_oversampling: int | None = 2
    """Saturates at so many times the sample rate, against aliasing."""
    clipping_prob_hard: float = 0.5
    """Share of clipped recordings that are cut off at the limit, others bend (tanh)."""
    clipping_prob: float = 0.5
    """Share of the recordings that are clipped."""
    rir_enabled: bool = False
    """Adds reverberation by room impulse responses."""
    rir_path: str | None = None
    """A Lhotse manifest of recorded impulse responses; null: they are simulated."""
    rir_prob: float = 0.5
    """Share of the recordings that reverberate."""
    compression_enabled: bool = False
    """Encodes and decodes by a lossy codec."""
    compression_prob: float = 0.5
    """Share of the recordings that are compressed."""
    compression_level_interval: Interval = (0.8, 0.99)
    """0 is the highest bit rate of a codec, 1 the lowest; gsm has one."""
    compression_codecs: tuple[Codec, ...] = ("opus",)
    """Codecs to choose from: opus, mp3, vorbis, gsm."""
    compression_codec_weights: tuple[float, ...] | None = None
    """Weight of each codec; null: all alike."""
    compression_enable_for_custom_fields: bool = False
    """Compresses the agent's recording (`target_audio`) with the user's, in duplex data."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be."""
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in _INTERVALS:
            low, high = interval(getattr(self, name))
            if not low <= high:
                raise ValueError(f"{name} must be [low, high], got {[low, high]}")
        _check_sound(self)


_PROBABILITIES = (
    "noise_mix_prob",
    "volume_prob",
    "lowpass_prob",
    "clipping_prob_hard",
    "clipping_prob",
    "rir_prob",
    "compression_prob",
)
_SECONDS = (
    "truncate_duration",
    "cut_into_windows_duration",
    "cut_into_windows_hop",
    "pad_min_duration",
)
_INTERVALS = (
    "noise_snr",
    "volume_interval",
    "lowpass_frequencies_interval",
    "clipping_gain_db",
    "compression_level_interval",
)


def interval(value: float | Interval) -> Interval:
    """Both ends; those of a number are the number."""
    return value if isinstance(value, tuple) else (value, value)


def warn_without_switch(config: AugmentationConfig, where: str) -> None:
    """Tells of keys that are set but have no effect."""
    for key, switch in without_switch(config).items():
        _log.warning("%s.%s has no effect without %s", where, key, switch)


def without_switch(config: AugmentationConfig) -> dict[str, str]:
    """Keys that were changed but have no effect -> the key that would give them one."""
    default = {one.name: one.default for one in fields(config)}
    return {
        key: switch
        for switch, keys in SWITCHES.items()
        for key in keys
        if key in default and not getattr(config, switch) and getattr(config, key) != default[key]
    }


def _check_sound(config: AugmentationConfig) -> None:
    if config.volume_interval[0] < 0:
        raise ValueError(f"volume_interval must not be negative, got {config.volume_interval[0]}")
    if config.lowpass_frequencies_interval[0] <= 0:
        raise ValueError("lowpass_frequencies_interval must be positive")
    if config.clipping_oversampling is not None and config.clipping_oversampling < 1:
        raise ValueError(
            f"clipping_oversampling must be 1 or more or null, got {config.clipping_oversampling}"
        )
    low, high = config.compression_level_interval
    if low < 0 or high > 1:
        raise ValueError(f"compression_level_interval must lie in 0 to 1, got {[low, high]}")
    codecs, weights = config.compression_codecs, config.compression_codec_weights
    if not codecs or len(set(codecs)) != len(codecs):
        raise ValueError(f"compression_codecs must be distinct codecs, got {list(codecs)}")
    if weights is not None and (
        len(weights) != len(codecs) or min(weights) < 0 or not sum(weights) > 0
    ):
        raise ValueError(
            f"compression_codec_weights: give one weight to each of {list(codecs)}, not all 0"
        )
