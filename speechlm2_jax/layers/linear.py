"""Dense and embedding layers with the checkpoint's own weight layout ([out, in])."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.cpu import is_slow_matmul, weight_first_matmul
from speechlm2_jax.layers.module import MAY_BE_WORDS, Initializer, param
from speechlm2_jax.layers.quantized import is_quantized
from speechlm2_jax.layers.weight_in_place import weight_in_place
from speechlm2_jax.layers.words import BFLOAT16, floats, is_words, matmul_narrow
from speechlm2_jax.sharding import constrain, is_on_one_cpu

default_init: Initializer = jax.nn.initializers.variance_scaling(
    1.0 / 3.0, "fan_in", "uniform", in_axis=1, out_axis=0
)
"""U(-1/sqrt(in), 1/sqrt(in)) over a [out, in] kernel: torch's default for Linear and 1x1 conv."""
zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def gathered(weight: nnx.Param, dtype: DTypeLike) -> Array:
    """Returns a weight ready for a matmul: in `dtype`, and not sharded along the model width.

    It is all-gathered in the narrower dtype: fp32 weights in bf16, quantized values as they are.
    """
    value = weight[...]
    axes = weight.get_metadata()["axes"][-value.ndim :]
    kept = [None if axis == "embed" else axis for axis in axes]
    if is_quantized(value):
        return constrain(value, *kept).astype(dtype)
    return constrain(floats(value, dtype), *kept)


def matmul(
    x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"], **options: Any
) -> Float[Array, "*batch d_out"]:
    """Computes x Wᵀ; `options` are those of einsum."""
    if is_slow_matmul(math.prod(x.shape[:-1])):
        return weight_first_matmul(x, weight, **options)
    return jnp.einsum("...d,od->...o", x, weight, **options)


def project(
    x: Float[Array, "*batch d_in"],
    weight: nnx.Param,
    scale: nnx.Param | None = None,
    **options: Any,
) -> Float[Array, "*batch d_out"]:
    """Computes x Wᵀ with the weight cast to the dtype of x; `options` are those of einsum.

    The result is multiplied by the `scale` [d_out] of a quantized weight.
    """
    y = _unscaled(x, weight, **options)
    if scale is None:
        return y
    return y * jnp.broadcast_to(scale[...].astype(y.dtype), y.shape)


def _unscaled(
    x: Float[Array, "*batch d_in"], weight: nnx.Param, **options: Any
) -> Float[Array, "*batch d_out"]:
    value = weight[...]
    if is_words(value) or (is_quantized(value) and is_on_one_cpu()):
        return matmul_narrow(x, value, **options)
    axes = weight.get_metadata()["axes"][-value.ndim :]
    placed = weight_in_place(axes, value.shape, math.prod(x.shape[:-1]))
    if placed is None:
        return matmul(x, gathered(weight, x.dtype), **options)
    stored = constrain(floats(value, x.dtype), *axes)
    y = jnp.einsum("...d,od->...o", placed.constrain(x, placed.into), stored, **options)
    return placed.constrain(y, placed.out)


class Linear(nnx.Module):
    """y = x Wᵀ + b. `axes` names (output, input); parameters are cast to the dtype of `x`.

    `weight_scale` [out] belongs to a quantized weight (`layers/quantized_layers.py`).
    """

    weight_scale: nnx.Param | None

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
        self.weight.set_metadata(**{MAY_BE_WORDS: True})
        self.weight_scale = None
        self.bias = param(rngs, (d_out,), (axes[0],), zeros) if bias else None

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Applies the layer over the last axis, in the dtype of `x`."""
        y = project(x, self.weight, self.weight_scale)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


def send_rows(
    x: Float[Array, "*batch d_in"], *layers: Linear | None
) -> Float[Array, "*batch d_in"]:
    """Sends the rows of x once for several layers that leave their weights in place.

    Where the first of them gathers its weight, x is returned as it is.
    """
    weight = next(layer.weight for layer in layers if layer is not None)
    axes, shape = weight.get_metadata()["axes"], weight[...].shape
    placed = weight_in_place(axes[-2:], shape, math.prod(x.shape[:-1]))
    return x if placed is None else placed.constrain(x, placed.into)


class Embedding(nnx.Module):
    """A table of `count` vectors of width `width`; `weight_scale` as for `Linear`."""

    weight_scale: nnx.Param | None

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs, init: Initializer | None = None):
        self.weight = param(
            rngs, (count, width), ("vocab", "embed"), init or jax.nn.initializers.normal(0.02)
        )
        self.weight.set_metadata(**{MAY_BE_WORDS: True})
        self.weight_scale = None

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        """Looks ids up."""
        table = self.weight[...]
        axes = self.weight.get_metadata()["axes"][-2:]  # a stack's have one of the layers before
        placed = weight_in_place(axes, table.shape, math.prod(ids.shape))
        # XLA replicates the result of a gather from a table that is sharded along both axes.
        table = constrain(table, "vocab", None) if placed is None else constrain(table, *axes)
        rows = jnp.take(table, ids, axis=0)
        if self.weight_scale is not None:
            scales = jnp.take(self.weight_scale[...], ids, axis=0)[..., None]
            return rows.astype(jnp.float32) * scales.astype(jnp.float32)
        return floats(rows, BFLOAT16) if is_words(rows) else rows
