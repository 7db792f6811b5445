"""Dropout whose draws belong to the example, not to its place in a batch."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_WORDS = 2**32
_GOLDEN = 0x9E3779B1
"""2**32 over the golden ratio, odd: spreads consecutive numbers over all words."""


def dropout(
    x: Float[Array, "B *rest"], rate: float, rngs: Key[Array, " B"] | None, salt: int | Array = 0
) -> Float[Array, "B *rest"]:
    """Zeroes a share `rate` of `x` and scales the rest by 1/(1-rate).

    One key per example, so neighbours and padding to the right change no example's mask. `salt`
    tells apart the places that share a key. Without keys, or with rate 0, `x` comes back as it is.
    """
    if rngs is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: keep_mask(key, salt, x.shape[1:], rate))(rngs)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def drop_weights(
    weights: Float[Array, "B N Q S"],
    rate: float,
    rngs: Key[Array, " B"] | None,
    rows: Int[Array, " Q"],
) -> Float[Array, "B N Q S"]:
    """Dropout of attention weights, each query (number `rows` of its example) with its own draws.

    Padding then changes no draw: element (head, key) of a query is number key x N + head.
    """
    if rngs is None or rate == 0.0:
        return weights
    _, heads, _, steps = weights.shape
    number = jnp.arange(steps)[None, :] * heads + jnp.arange(heads)[:, None]  # [N, S]

    def keep(key: Array, row: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, row), 0)
        return _keep(key, number.astype(jnp.uint32), rate)

    kept = jax.vmap(jax.vmap(keep, (None, 0), 1), (0, None))(rngs, rows)  # [B, N, Q, S]
    return jnp.where(kept, weights / (1.0 - rate), jnp.zeros((), weights.dtype))


def keep_mask(
    key: Key[Array, ""], salt: int | Array, shape: tuple[int, ...], rate: float
) -> Bool[Array, "*shape"]:
    """Draws which elements stay: each with probability 1 - rate, by its place from the front."""
    number = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _keep(jax.random.fold_in(key, salt), number, rate)


def _keep(
    key: Key[Array, ""], number: UInt32[Array, "*shape"], rate: float
) -> Bool[Array, "*shape"]:
    """Draws for each number of a key's stream whether it stays.

    Two words of the key's own stream and the element's number go through a finaliser of 32-bit
    hashes (xor-shift and multiply, twice): a tenth of the work of drawing each element's word from
    the stream, which took as long as the layers themselves on a CPU.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    word = _finalise(number * jnp.uint32(_GOLDEN) + first) ^ second
    threshold = jnp.uint32(min(round(rate * _WORDS), _WORDS - 1))
    return _finalise(word) >= threshold


def _finalise(word: Array) -> Array:
    """Mixes 32 bits so that each depends on all."""
    word = word ^ (word >> 16)
    word = word * jnp.uint32(0x7FEB352D)
    word = word ^ (word >> 15)
    word = word * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def fold_rngs(rngs: Key[Array, " B"] | None, salt: int | Array) -> Key[Array, " B"] | None:
    """Derives one key per example for a sub-module; None stays None."""
    return None if rngs is None else jax.vmap(lambda k: jax.random.fold_in(k, salt))(rngs)
