"""Initializers of convolution weights."""

import jax
from jax.typing import DTypeLike

from speechlm2_jax.layers.module import Initializer


def uniform(inputs: int) -> Initializer:
    """Returns U(-1/sqrt(n), 1/sqrt(n)) for fan-in n: torch's default for convolutions."""
    bound = inputs**-0.5

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw
