"""Dense and embedding layers with the checkpoint's own weight layout ([out, in])."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.module import Initializer, param
from speechlm2_jax.sharding import constrain, platform

FEW_ROWS = 32
"""Up to so many rows a product on a CPU waits for the weight rather than for its sums."""

default_init: Initializer = jax.nn.initializers.variance_scaling(
    1.0 / 3.0, "fan_in", "uniform", in_axis=1, out_axis=0
)
"""U(-1/sqrt(in), 1/sqrt(in)) over a [out, in] kernel: torch's default for Linear and 1x1 conv."""
zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def gathered(weight: nnx.Param, dtype: Any) -> Array:
    """A weight as a product needs it: in the dtype of the activations, all of the model width.

    Cast before it is gathered, so that half the bytes travel in bf16.
    """
    value = jnp.asarray(weight[...], dtype)
    axes = weight.get_metadata()["axes"][-value.ndim :]
    return constrain(value, *(None if axis == "embed" else axis for axis in axes))


def product(
    x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"], **options: Any
) -> Float[Array, "*batch d_out"]:
    """Computes x Wᵀ; `options` are those of einsum.

    On a CPU, for a few rows, as (W xᵀ)ᵀ: XLA's product reads a weight on its left at about the
    speed of memory and one on its right at half of it (docs/performance.md).
    """
    rows = math.prod(x.shape[:-1])
    if platform() != "cpu" or not 1 < rows <= FEW_ROWS:
        return jnp.einsum("...d,od->...o", x, weight, **options)
    columns = jnp.einsum("od,rd->or", weight, x.reshape(rows, -1), **options)
    # without the barrier XLA turns the product round again
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """y = x Wᵀ + b. `axes` names (output, input); parameters are cast to the dtype of `x`."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        bias: bool = True,
        init: Initializer = default_init,
    ):
        self.weight = param(rngs, (d_out, d_in), axes, init)
        self.bias = param(rngs, (d_out,), (axes[0],), zeros) if bias else None

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Applies the layer over the last axis, in the dtype of `x`."""
        y = product(x, gathered(self.weight, x.dtype))
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


class Embedding(nnx.Module):
    """A table of `count` vectors of width `width`."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs, init: Initializer | None = None):
        self.weight = param(
            rngs, (count, width), ("vocab", "embed"), init or jax.nn.initializers.normal(0.02)
        )

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """Looks ids up."""
        # A gather from a table that is sharded both ways makes XLA rematerialise the result.
        return jnp.take(constrain(self.weight[...], "vocab", None), ids, axis=0)
