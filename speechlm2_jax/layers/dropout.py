"""Dropout whose random draws depend on the example, not on its batch or padding."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_UINT32 = 2**32
_GOLDEN = 0x9E3779B1
"""2**32 over the golden ratio, made odd: spreads consecutive numbers over all 32-bit words."""


def dropout(
    x: Float[Array, "B *rest"], rate: float, rngs: Key[Array, " B"] | None, salt: int | Array = 0
) -> Float[Array, "B *rest"]:
    """Zeroes elements of `x` with probability `rate` and scales the others by 1/(1-rate).

    One random key per example: neither its batch nor padding on the right changes an example's
    mask. `salt` separates the places that share a key. Does nothing if `rngs` is None or `rate` 0.
    """
    if rngs is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: keep_mask(key, salt, x.shape[1:], rate))(rngs)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def drop_weights(
    weights: Float[Array, "B N Q S"],
    rate: float,
    rngs: Key[Array, " B"] | None,
    query_positions: Int[Array, " Q"],
) -> Float[Array, "B N Q S"]:
    """Dropout of attention weights; the draws of a query depend on its position in the example.

    So padding changes no draw: element (head, key) of a query is number key * N + head.
    """
    if rngs is None or rate == 0.0:
        return weights
    _, heads, _, key_count = weights.shape
    number = jnp.arange(key_count)[None, :] * heads + jnp.arange(heads)[:, None]  # [N, S]

    def keep(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, position), 0)
        return _keep(key, number.astype(jnp.uint32), rate)

    kept = jax.vmap(jax.vmap(keep, (None, 0), 1), (0, None))(rngs, query_positions)  # [B, N, Q, S]
    return jnp.where(kept, weights / (1.0 - rate), jnp.zeros((), weights.dtype))


def keep_mask(
    key: Key[Array, ""], salt: int | Array, shape: tuple[int, ...], rate: float
) -> Bool[Array, "*shape"]:
    """Draws which elements are kept, each with probability 1 - rate, by its index in `shape`."""
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _keep(jax.random.fold_in(key, salt), number, rate)


def _keep(
    key: Key[Array, ""], number: UInt32[Array, "*shape"], rate: float
) -> Bool[Array, "*shape"]:
    """Draws for each element, given by its number, whether it is kept.

    Only two random words come from the key. Each element's word is a 32-bit hash of its number and
    these two. Drawing a word per element with `jax.random` is ten times the work; on a CPU that
    took as long as the layers themselves.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    word = _hash32(number * jnp.uint32(_GOLDEN) + first) ^ second
    threshold = jnp.uint32(min(round(rate * _UINT32), _UINT32 - 1))
    return _hash32(word) >= threshold


def _hash32(word: Array) -> Array:
    """Mixes the bits (xor-shift and multiply, twice), so that each depends on all."""
    word = word ^ (word >> 16)
    word = word * jnp.uint32(0x7FEB352D)
    word = word ^ (word >> 15)
    word = word * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def fold_rngs(rngs: Key[Array, " B"] | None, salt: int | Array) -> Key[Array, " B"] | None:
    """Derives one random key per example for a sub-module; None stays None."""
    return None if rngs is None else jax.vmap(lambda k: jax.random.fold_in(k, salt))(rngs)
