"""SpecAugment (Park et al. 2019): masks random spans of time and frequency."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.perception.frames import Frames

_ONLY_WITH_CUTOUT = "only read by rectangular cut-out, which is refused"
_NEMO_KERNELS = "chooses among NeMo's implementations"


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """NeMo's SpectrogramAugmentation block, key by key."""

    TARGETS: ClassVar[tuple[str, ...]] = ("SpectrogramAugmentation",)
    IGNORED: ClassVar[Mapping[str, str]] = {
        "rect_time": _ONLY_WITH_CUTOUT,
        "rect_freq": _ONLY_WITH_CUTOUT,
        "use_vectorized_spec_augment": _NEMO_KERNELS,
        "use_numba_spec_augment": _NEMO_KERNELS,
    }
    REFUSED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "rect_masks": ("rectangular cut-out is not supported; set it to 0", 0),
        "rng": ("random draws come from the run's seed; set rng to null", None),
    }

    freq_masks: int = 0
    time_masks: int = 0
    freq_width: int = 10
    """Upper bound (exclusive) of a frequency mask, in mel bins."""
    time_width: int | float = 10
    """Upper bound (exclusive) of a time mask: frames if int, fraction of the clip if float."""
    mask_value: float = 0.0

    def __post_init__(self) -> None:
        for key in ("freq_masks", "time_masks", "freq_width", "time_width"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")
        if isinstance(self.time_width, float) and self.time_width > 1.0:
            raise ValueError(
                f"time_width={self.time_width} is a fraction of the clip; it must be at most 1.0"
            )


def spec_augment(
    features: Frames, config: SpecAugmentConfig, rngs: Key[Array, " B"]
) -> Float[Array, "B T M"]:
    """Masks each clip. The draws depend only on the clip's key and length."""
    n_frames, bins = features.frames.shape[1:]

    def clip_mask(key: Array, length: Array) -> Bool[Array, "T M"]:
        time_key, freq_key = jax.random.split(key)
        widest = config.time_width
        if isinstance(widest, float):
            widest = widest * length.astype(jnp.float32)
        time_mask = _random_spans(time_key, config.time_masks, widest, length, n_frames)
        size = jnp.asarray(bins, jnp.int32)
        freq_mask = _random_spans(freq_key, config.freq_masks, config.freq_width, size, bins)
        return time_mask[:, None] | freq_mask[None, :]

    is_masked = jax.vmap(clip_mask)(rngs, features.lengths)
    return jnp.where(is_masked, config.mask_value, features.frames)


def _random_spans(
    key: Key[Array, ""],
    count: int,
    widest: int | float | Float[Array, ""],
    length: Int[Array, ""],
    size: int,
) -> Bool[Array, " size"]:
    """True inside `count` random spans of the first `length` of `size` positions."""
    width_key, start_key = jax.random.split(key)
    widths = jnp.floor(jax.random.uniform(width_key, (count,)) * widest)
    latest = jnp.maximum(length.astype(jnp.float32) - widths, 0.0)
    starts = jnp.floor(jax.random.uniform(start_key, (count,)) * latest)
    position = jnp.arange(size, dtype=jnp.float32)[None, :]
    inside = (position >= starts[:, None]) & (position < (starts + widths)[:, None])
    return jnp.any(inside, axis=0)
