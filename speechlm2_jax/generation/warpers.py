"""Truncation of the distribution before sampling, with the semantics of Hugging Face's options.

Each `keep_*` sets the scores of the dropped tokens to -inf. It keeps at least `least` tokens
(transformers' `min_tokens_to_keep`). All numbers but `k` and `least` may be traced.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Number = Array | float | int
TOP_H_TOKENS = 100
"""Top-h considers this many of the most likely tokens, as in transformers."""


def keep_top_k(scores: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keeps the k highest scores, and all that equal the k-th (Fan et al. 2018)."""
    return jnp.where(scores < _kth(scores, k), -jnp.inf, scores)


def keep_top_p(scores: Float[Array, "B V"], p: Number, least: int = 1) -> Float[Array, "B V"]:
    """Drops the least likely tokens while their sum is at most 1 - p (Holtzman et al. 2019)."""
    order = jnp.argsort(scores, axis=-1)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    dropped = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1.0 - p
    dropped = dropped.at[:, -least:].set(False)
    # The rank of a token is the inverse of the sorting permutation.
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(dropped, rank, axis=-1), -jnp.inf, scores)


def keep_min_p(scores: Float[Array, "B V"], p: Number, least: int = 1) -> Float[Array, "B V"]:
    """Keeps tokens at least `p` times as likely as the most likely one (Nguyen et al. 2024)."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    unlikely = probabilities < p * jnp.max(probabilities, axis=-1, keepdims=True)
    return _drop(scores, unlikely, least)


def keep_top_h(scores: Float[Array, "B V"], h: Number, least: int = 1) -> Float[Array, "B V"]:
    """Keeps the most likely tokens whose entropy terms sum to at most h times the entropy.

    The entropy is that of the distribution over the TOP_H_TOKENS most likely tokens; all others are
    dropped (top-H decoding, arXiv 2509.02510, as in transformers).
    """
    values, tokens = jax.lax.top_k(scores, min(TOP_H_TOKENS, scores.shape[-1]))
    terms = _entropy_terms(values)
    is_kept = jnp.cumsum(terms, axis=-1) <= h * jnp.sum(terms, axis=-1, keepdims=True)
    is_kept = is_kept.at[:, :least].set(True)
    example = jnp.arange(len(scores))[:, None]
    mask = jnp.zeros(scores.shape, bool).at[example, tokens].set(is_kept)
    return jnp.where(mask, scores, -jnp.inf)


def keep_typical(scores: Float[Array, "B V"], mass: Number, least: int = 1) -> Float[Array, "B V"]:
    """Keeps the tokens whose information content is closest to the entropy.

    Tokens are kept until their probabilities sum to `mass`: locally typical sampling (Meister et
    al. 2022).
    """
    surprise = -jax.nn.log_softmax(scores, axis=-1)
    distance = jnp.abs(surprise - _entropy(scores))
    nearest = jnp.argsort(distance, axis=-1)
    ordered = jnp.take_along_axis(distance, nearest, axis=-1)
    sums = jnp.cumsum(jnp.take_along_axis(jnp.exp(-surprise), nearest, axis=-1), axis=-1)
    last = jnp.minimum(jnp.sum(sums < mass, axis=-1, keepdims=True), scores.shape[-1] - 1)
    farthest = jnp.take_along_axis(ordered, jnp.maximum(last, least - 1), axis=-1)
    return jnp.where(distance > farthest, -jnp.inf, scores)


def keep_epsilon(
    scores: Float[Array, "B V"], epsilon: Number, least: int = 1
) -> Float[Array, "B V"]:
    """Keeps tokens of at least this probability (Hewitt et al. 2022)."""
    return _drop(scores, jax.nn.softmax(scores, axis=-1) < epsilon, least)


def keep_eta(scores: Float[Array, "B V"], eta: Number, least: int = 1) -> Float[Array, "B V"]:
    """Keeps tokens of at least min(eta, sqrt(eta) exp(-entropy)) (Hewitt et al. 2022)."""
    bound = jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-_entropy(scores)))
    return _drop(scores, jax.nn.softmax(scores, axis=-1) < bound, least)


def _kth(scores: Float[Array, "B V"], k: int) -> Float[Array, "B 1"]:
    return jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]


def _drop(
    scores: Float[Array, "B V"], is_dropped: Bool[Array, "B V"], least: int
) -> Float[Array, "B V"]:
    return jnp.where(is_dropped & (scores < _kth(scores, least)), -jnp.inf, scores)


def _entropy_terms(scores: Float[Array, "B V"]) -> Float[Array, "B V"]:
    log = jax.nn.log_softmax(scores, axis=-1)
    return jnp.where(jnp.isneginf(log), 0.0, -jnp.exp(log) * log)


def _entropy(scores: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    return jnp.sum(_entropy_terms(scores), axis=-1, keepdims=True)
