"""Rotary position embedding (Su et al. 2021), in Hugging Face's half-rotation layout."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023; rope_type "linear")."""

    factor: float

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
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

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling: high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Divides each frequency by a factor between 1 and `factor`, by its wavelength."""
        turns = self.original_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Base of the frequencies, and how a checkpoint rescales them for long sequences."""

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self, head_width: int) -> np.ndarray:
        """Returns the `head_width / 2` angles per position, fp32, fastest first."""
        frequencies = self.theta ** -(np.arange(0, head_width, 2) / head_width)
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies)
        return frequencies.astype(np.float32)


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, shared by all heads and layers."""

    cos: Float[Array, "B T H2"]
    sin: Float[Array, "B T H2"]


def rotation(config: RopeConfig, positions: Int[Array, "B T"], head_width: int) -> Rotation:
    """Computes the angles of `positions` in fp32: bf16 rounds positions above 256."""
    frequencies = jnp.asarray(config.frequencies(head_width))
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) of every head by the angles of their position."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
