"""Code that exists only because XLA is slow at something on CPUs, each piece with its measurement.

Everywhere else the plain form is used. The measurements are in docs/performance.md. Three more are
in `layers/unstacked.py` (layers read in place), `layers/words.py` (bf16 weights without an fp32
copy) and `codec/convolutions.py` (convolutions of few channels), beside what they replace.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from speechlm2_jax.sharding import platform

FEW_ROWS = 32
"""Up to this many rows of the input, a matmul on a CPU takes the time to read the weight."""
LOSS_CHUNKS = 4
"""Chunks of the loss on a CPU where one chunk would hold all scored positions."""
_LEVEL = "xla_backend_optimization_level"


def fast_compile_options() -> dict[str, int] | None:
    """Compiler options for a program that runs once (initial values); None for the defaults.

    On a CPU the last XLA passes take most of the compile time. They change no bit of the result.
    """
    if jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", ""):
        return {_LEVEL: 1}
    return None


def is_slow_matmul(rows: int) -> bool:
    """True if x Wᵀ with `rows` rows of x is faster as `weight_first_matmul`: 2 to 32, on a CPU."""
    return platform() == "cpu" and 1 < rows <= FEW_ROWS


def weight_first_matmul(
    x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"], **options: Any
) -> Float[Array, "*batch d_out"]:
    """Computes x Wᵀ as (W xᵀ)ᵀ; `options` are those of einsum.

    XLA reads a weight on the left of a matmul at 8 to 13 GB/s and one on the right at 4 to 8.
    """
    rows = math.prod(x.shape[:-1])
    columns = jnp.einsum("od,rd->or", weight, x.reshape(rows, -1), **options)
    # without the barrier XLA swaps the operands back
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


def loss_chunk(positions: int) -> int:
    """Positions of a loss chunk, where one chunk could hold all: a quarter of them on a CPU.

    Chunks without a target are skipped: the head of a training step of batch 4 took 50 ms instead
    of 167 ms, of 2,150 ms in all.
    """
    return -(-positions // LOSS_CHUNKS) if platform() == "cpu" else positions
