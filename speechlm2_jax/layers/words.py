"""Narrow weights on a CPU: bf16, given to programs as words of 16 bits, and quantized ones.

XLA on CPUs computes bf16 as fp32. It converts whole weights, whole stacks even, before a loop, so a
program holds an fp32 copy of the model and makes it anew at every call. It leaves integers alone.
So bf16 weights enter an inference program as uint16, and a matmul makes floats of a few rows at a
time, which stay in the processor's cache. The results have the same bits. A matrix of 6144 x 2048
times a vector takes 2.4 ms of processor time, as with fp32 weights; converted whole, 6.3 ms.
QuantizedArray weights (`layers/quantized.py`) are read in the same way.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from speechlm2_jax.layers.cpu import is_slow_matmul, weight_first_matmul

CHUNK_ELEMENTS = 1 << 19
"""Elements that are floats at a time: 2 MB."""
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def is_words(value: Any) -> bool:
    """Whether a weight is words: no weight has this dtype otherwise."""
    return value.dtype == jnp.uint16


def words_of(value: Any) -> jax.Array:
    """The words of a bf16 array of one CPU; they share its memory."""
    device = next(iter(value.devices()))
    return jax.device_put(np.asarray(value).view(np.uint16), device)


def floats(value: Any, dtype: Any) -> Array:
    """A weight in `dtype`, whether it is words or not."""
    return jnp.asarray(_fp32(value) if is_words(value) else value, dtype)


def matmul_narrow(
    x: Float[Array, "*batch d_in"],
    weight: Shaped[Array, "d_out d_in"],
    *,
    preferred_element_type: Any = None,
) -> Float[Array, "*batch d_out"]:
    """Computes x Wᵀ in fp32, for words or quantized values without their scales.

    The result has the dtype of x, or the preferred one.
    """
    count, width = weight.shape
    flat = x.reshape(-1, width).astype(jnp.float32)
    # Two chunks at least: of a loop of one turn XLA converts all weights before the first matmul.
    rows = min(max(1, CHUNK_ELEMENTS // width), max(1, count // 2))

    def product(part: Shaped[Array, "rows d_in"]) -> Float[Array, "R rows"]:
        wide = floats(part, jnp.float32)
        if is_slow_matmul(len(flat)):
            return weight_first_matmul(flat, wide)
        return jnp.einsum("rd,od->ro", flat, wide)

    def chunk(start: Array) -> Float[Array, "R rows"]:
        return product(jax.lax.dynamic_slice_in_dim(weight, start, rows))

    whole = count // rows * rows
    parts = jax.lax.map(chunk, jnp.arange(0, whole, rows))  # [chunks, R, rows]
    y = jnp.moveaxis(parts, 0, 1).reshape(len(flat), whole)
    if whole < count:
        y = jnp.concatenate([y, product(weight[whole:])], axis=1)
    return y.reshape(*x.shape[:-1], count).astype(preferred_element_type or x.dtype)


def _fp32(words: Array) -> Array:
    """The floats whose upper half the words are."""
    return jax.lax.bitcast_convert_type(words.astype(jnp.uint32) << 16, jnp.float32)
