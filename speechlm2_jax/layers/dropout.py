"""Dropout whose draws belong to the example, not to its place in a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "B *rest"], rate: float, keys: Key[Array, " B"] | None, salt: int | Array = 0
) -> Float[Array, "B *rest"]:
    """Zeroes a share `rate` of `x` and scales the rest by 1/(1-rate).

    One key per example, so neighbours and padding to the right change no example's mask. `salt`
    tells apart the places that share a key. Without keys, or with rate 0, `x` comes back as it is.
    """
    if keys is None or rate == 0.0:
        return x

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1.0 - rate), jnp.zeros((), x.dtype))


def fold_keys(keys: Key[Array, " B"] | None, salt: int | Array) -> Key[Array, " B"] | None:
    """Derives one key per example for a sub-module; None stays None."""
    return None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, salt))(keys)
