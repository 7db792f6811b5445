"""Normalisation over the last axis, computed in fp32 whatever the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.layers.linear import ones, zeros
from speechlm2_jax.layers.module import param


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016).

    With `plus_one` the factor is 1 + weight (NVIDIA's LayerNorm1P).
    """

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-5,
        bias: bool = True,
        plus_one: bool = False,
    ):
        self.eps = eps
        self.plus_one = plus_one
        self.weight = param(rngs, (width,), ("norm",), zeros if plus_one else ones)
        self.bias = param(rngs, (width,), ("norm",), zeros) if bias else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        y = y * _factor(self, x)
        return (y if self.bias is None else y + _f32(self.bias, x)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019; Hugging Face LlamaRMSNorm).

    With `plus_one` the factor is 1 + weight (Hugging Face GemmaRMSNorm).
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, eps: float, plus_one: bool = False):
        self.eps = eps
        self.plus_one = plus_one
        self.weight = param(rngs, (width,), ("norm",), zeros if plus_one else ones)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (y * _factor(self, x)).astype(x.dtype)


def _factor(norm: LayerNorm | RMSNorm, like: Array) -> Array:
    weight = _f32(norm.weight, like)
    return 1.0 + weight if norm.plus_one else weight


def _f32(variable: nnx.Param, like: Array) -> Array:
    return jnp.broadcast_to(variable[...].astype(jnp.float32), like.shape)
