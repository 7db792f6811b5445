"""Rotary position embedding (RoPE; Su et al. 2021) and its scalings for long sequences.

The formulas are those of Hugging Face's `modeling_rope_utils`. A scaling changes the frequencies
(`scale`). Dynamic NTK and LongRoPE also depend on the sequence length at run time. YaRN and
LongRoPE also multiply cosines and sines by an attention factor.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023; rope_type "linear")."""

    factor: float
    attention_factor: float = 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Divides every frequency by the factor."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Only low frequencies are divided by `factor` (Llama 3.1; rope_type "llama3").

    Low: wavelengths above `original_positions / low_freq_factor`. Frequencies with wavelengths
    below `original_positions / high_freq_factor` stay; those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling: high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Divides each frequency by a factor between 1 and `factor`, by its wavelength."""
        turns = self.original_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Frequencies between two numbers of rotations are interpolated (Peng et al. 2023; "yarn").

    A frequency that rotates more than `beta_fast` times over `original_positions` stays, one that
    rotates fewer than `beta_slow` times is divided by `factor`.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Round the bounds of the ramp to whole frequencies."""

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Mixes each frequency with its quotient along a linear ramp over the frequencies."""
        width = 2 * len(frequencies)

        def frequency_of(rotations: float) -> float:
            periods = self.original_positions / (rotations * 2 * math.pi)
            return width * math.log(periods) / (2 * math.log(theta))

        low, high = frequency_of(self.beta_fast), frequency_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high  # as the original, against division by zero
        divided = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0.0, 1.0)
        return frequencies / self.factor * divided + frequencies * (1.0 - divided)


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """A base that grows with the length beyond `original_positions` (rope_type "dynamic")."""

    factor: float
    original_positions: int
    attention_factor: float = 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies of a sequence that is not longer than `original_positions`."""
        return frequencies

    def at_length(
        self, frequencies: Float[Array, " F"], theta: float, length: Int[Array, " B"]
    ) -> Float[Array, "B F"]:
        """Computes the frequencies of sequences of these lengths."""
        positions = jnp.maximum(length, self.original_positions).astype(jnp.float32)
        stretch = self.factor * positions / self.original_positions - (self.factor - 1)
        # theta' = theta * stretch^(d / (d - 2)), so frequency i, theta^(-2 i / d), is multiplied by
        # stretch^(-2 i / (d - 2))
        width = 2 * frequencies.shape[0]
        exponents = -jnp.arange(0, width, 2, dtype=jnp.float32) / (width - 2)
        return frequencies[None] * stretch[:, None] ** exponents[None]


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A divisor per frequency, for short and for long sequences (Ding et al. 2024; "longrope")."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_positions: int
    attention_factor: float

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the frequencies of a sequence that is not longer than `original_positions`."""
        return frequencies / self._divisors(self.short_factor, len(frequencies))

    def at_length(
        self, frequencies: Float[Array, " F"], theta: float, length: Int[Array, " B"]
    ) -> Float[Array, "B F"]:
        """Computes the frequencies of sequences of these lengths."""
        count = frequencies.shape[0]
        ratio = self._divisors(self.short_factor, count) / self._divisors(self.long_factor, count)
        is_long = (length > self.original_positions)[:, None]
        long = frequencies * jnp.asarray(ratio, jnp.float32)
        return jnp.where(is_long, long[None], frequencies[None])

    def check(self, count: int) -> None:
        """Raises ValueError unless there are factors for `count` frequencies."""
        for name in ("short_factor", "long_factor"):
            given = len(getattr(self, name))
            if given != count:
                raise ValueError(
                    f"rope_scaling: {name} has {given} numbers, expected {count}, one per frequency"
                )

    def _divisors(self, factors: tuple[float, ...], count: int) -> np.ndarray:
        self.check(count)
        return np.asarray(factors)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which part of each head is rotated, how fast, and in which layout."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    width: int | None = None
    """Number of leading elements of each head that are rotated; None: all of them."""
    interleaved: bool = False
    """Pairs are neighbours (x[2i], x[2i+1]), not (x[i], x[i + width/2])."""

    def rotated(self, head_width: int) -> int:
        """Returns the number of rotated elements of a head."""
        return head_width if self.width is None else self.width

    def frequencies(self, head_width: int) -> np.ndarray:
        """Returns one angle per position for each rotated pair, fp32, fastest first."""
        width = self.rotated(head_width)
        frequencies = self.theta ** -(np.arange(0, width, 2) / width)
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies, self.theta)
        return frequencies.astype(np.float32)


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, shared by all heads."""

    cos: Float[Array, "B T F"]
    sin: Float[Array, "B T F"]


def rotation(
    config: RopeConfig,
    positions: Int[Array, "B T"],
    head_width: int,
    is_real: Bool[Array, "B T"] | None = None,
) -> Rotation:
    """Computes the angles of `positions` in fp32: bf16 rounds positions above 256.

    For dynamic NTK and LongRoPE the length of each sequence is its greatest position where
    `is_real` (None: everywhere), plus 1. Hugging Face uses the longest sequence of the batch
    instead, so its result for a sequence depends on the batch.
    """
    frequencies = jnp.asarray(config.frequencies(head_width))
    scaling = config.scaling
    if isinstance(scaling, DynamicScaling | LongRopeScaling):
        counted = positions if is_real is None else jnp.where(is_real, positions, 0)
        per_sequence = scaling.at_length(frequencies, config.theta, jnp.max(counted, axis=1) + 1)
        angles = positions.astype(jnp.float32)[:, :, None] * per_sequence[:, None, :]
    else:
        angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.attention_factor != 1.0:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return Rotation(cos, sin)


def rotate(
    x: Float[Array, "B T N H"], by: Rotation, *, interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Rotates the pairs of every head by the angles of their position.

    A pair is (x[i], x[i + F]), or, `interleaved`, (x[2i], x[2i+1]), for each of the F angles.
    Elements of a head beyond the first 2 F are unchanged.
    """
    rotated_width = 2 * by.cos.shape[-1]
    rest = x[..., rotated_width:]
    x32 = x[..., :rotated_width].astype(jnp.float32)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        rotated = pairs.reshape(x32.shape)
    else:
        first, second = jnp.split(x32, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
