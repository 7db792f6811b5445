"""Activation functions of feed-forward networks, by their names in checkpoints."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.layers.module import Initializer, buffer, param


def _squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


_tanh_gelu = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_new": _tanh_gelu,
        "gelu_fast": _tanh_gelu,
        "gelu_pytorch_tanh": _tanh_gelu,
        "relu": jax.nn.relu,
        "relu2": _squared_relu,
    }
)
"""Name in a checkpoint's config -> function, of those without parameters."""
XIELU = "xielu"
"""The activation that has parameters of its own: `Xielu`."""


class Xielu(nnx.Module):
    """xIELU (Huang and Schlag 2025), with a learnt slope on either side of zero (Apertus).

    `x > 0`: alpha_p x^2 + beta x; else (exp(min(x, eps)) - 1 - x) alpha_n + beta x. The stored
    slopes are those before softplus; alpha_n is beta larger. beta and eps are stored too, rounded
    to the checkpoint's dtype.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        def slope(value: float) -> Initializer:
            stored = math.log(math.expm1(value))
            return lambda key, shape, dtype: jnp.full(shape, stored, dtype)

        self.alpha_p = param(rngs, (1,), (None,), slope(0.8))
        self.alpha_n = param(rngs, (1,), (None,), slope(0.8 - 0.5))
        self.beta = buffer(jnp.asarray(0.5), ())
        self.eps = buffer(jnp.asarray(-1e-6), ())

    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        """Applies the activation."""
        beta, eps = (v[...].astype(x.dtype) for v in (self.beta, self.eps))
        alpha_p = jax.nn.softplus(self.alpha_p[...].astype(x.dtype))[None, None]
        alpha_n = beta + jax.nn.softplus(self.alpha_n[...].astype(x.dtype))[None, None]
        positive = alpha_p * x * x + beta * x
        negative = (jnp.expm1(jnp.minimum(x, eps)) - x) * alpha_n + beta * x
        return jnp.where(x > 0, positive, negative)
