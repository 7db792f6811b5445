"""Finite scalar quantization (Mentzer et al. 2023): each channel is rounded to a few levels.

A codebook covers D channels with L_d levels each; its code is sum_d digit_d * L_0 * ... * L_(d-1),
so the first channel is the least significant digit.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.codec.config import QuantizerConfig
from speechlm2_jax.layers.module import buffer


class Quantized(NamedTuple):
    """Quantized values and their codes."""

    values: Float[Array, "B T C"]
    codes: Int[Array, "B T K"]


class FiniteScalarQuantizer(nnx.Module):
    """K codebooks over equal groups of neighbouring channels."""

    def __init__(self, config: QuantizerConfig):
        self.config = config
        shape = (config.num_codebooks, len(config.levels))
        bases = [math.prod(config.levels[:d]) for d in range(len(config.levels))]
        # NeMo's checkpoints hold both, per group
        levels = jnp.broadcast_to(jnp.asarray(config.levels, jnp.int32)[None], shape)
        self.levels = buffer(levels, ("layers", "feature"))
        self.bases = buffer(
            jnp.broadcast_to(jnp.asarray(bases, jnp.int32)[None], shape), ("layers", "feature")
        )

    def __call__(self, x: Float[Array, "B T C"]) -> Quantized:
        """Quantizes; the gradient of the values is that of `compress` (straight-through)."""
        compressed = self.compress(x)
        rounded = jnp.round(compressed)
        half_levels = self._grid()[2]
        values = compressed + jax.lax.stop_gradient(rounded - compressed)
        digits = self._grouped(rounded).astype(jnp.int32) + self.levels[...][None, None] // 2
        codes = jnp.sum(digits * self.bases[...][None, None], axis=-1)
        return Quantized(values / half_levels, codes)

    def quantize(self, x: Float[Array, "B T C"]) -> Int[Array, "B T K"]:
        """Computes the codes."""
        return self(x).codes

    def dequantize(self, codes: Int[Array, "B T K"]) -> Float[Array, "B T C"]:
        """Computes the values of codes. Codes of codebook_size or more wrap around, as in NeMo."""
        levels = self.levels[...][None, None]
        digits = (codes[..., None] // self.bases[...][None, None]) % levels
        values = (digits - levels // 2).astype(jnp.float32) / (levels // 2).astype(jnp.float32)
        return values.reshape(*codes.shape[:2], -1)

    def compress(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Bounds each channel so that rounding gives its levels: h tanh(x + tan(o / h)) - o.

        h is `scale` and o is `offset`.
        """
        scale, offset, _ = self._grid()
        return scale * jnp.tanh(x + jnp.tan(offset / scale)) - offset

    def _grid(self) -> tuple[Array, Array, Array]:
        """Returns scale (a little under (L - 1) / 2), offset (0.5 for even L), and L // 2."""
        levels = self.levels[...].reshape(-1)[None, None].astype(jnp.float32)
        scale = (levels - 1) / 2 * np.float32(1 - self.config.eps)
        offset = jnp.where(levels % 2 == 0, jnp.float32(0.5), jnp.float32(0.0))
        return scale, offset, levels // 2

    def _grouped(self, x: Float[Array, "B T C"]) -> Float[Array, "B T K D"]:
        return x.reshape(*x.shape[:2], *self.levels.shape)
