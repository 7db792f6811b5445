"""Group normalisation of frame sequences over the counted frames only."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from speechlm2_jax.layers.linear import ones, zeros
from speechlm2_jax.layers.module import param

EPS = 1e-5


class GroupNorm(nnx.Module):
    """Normalises groups of channels of each sequence over time (Wu and He 2018), in fp32.

    NeMo also counts the padding of its batch.
    """

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.groups = groups
        self.weight = param(rngs, (width,), ("norm",), ones)
        self.bias = param(rngs, (width,), ("norm",), zeros)

    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Normalises every frame by the mean and variance of the counted ones."""
        batch, length, width = x.shape
        grouped = x.astype(jnp.float32).reshape(batch, length, self.groups, width // self.groups)
        mask = counted[:, :, None, None]
        count = jnp.sum(counted, axis=1, dtype=jnp.float32)[:, None, None, None]
        count = jnp.maximum(count * grouped.shape[-1], 1.0)

        def mean(values: Array) -> Array:
            return jnp.sum(jnp.where(mask, values, 0.0), axis=(1, 3), keepdims=True) / count

        centred = grouped - mean(grouped)
        y = centred * jax.lax.rsqrt(mean(jnp.square(centred)) + EPS)
        weight, bias = (v[...].astype(jnp.float32)[None, None] for v in (self.weight, self.bias))
        return (y.reshape(x.shape) * weight + bias).astype(x.dtype)
