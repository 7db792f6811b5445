"""Attention that computes every score of a dense mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from speechlm2_jax.layers.scores import Scores


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N_kv H"],
    v: Float[Array, "B S N_kv H"],
    mask: Bool[Array, "B T S"],
    scores: Scores,
) -> Float[Array, "B T N H"]:
    """Attends to the keys where the mask is True. The window of `scores` is in the mask already."""
    B, T, N, H = q.shape
    N_kv = k.shape[2]
    # t query, s key, k key/value head, g query head within its group: N = N_kv * G
    grouped = q.reshape(B, T, N_kv, N // N_kv, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    # The least finite value, not -inf: softmax over a query without any key must not be NaN.
    masked = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None, :, :], scores.of(logits), masked)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    # matmul per key/value head, in the cache's order; einsum would transpose V (twice the time)
    mixed = jnp.matmul(weights.reshape(B, N_kv, -1, v.shape[1]), v.swapaxes(1, 2))
    return mixed.reshape(B, N_kv, N // N_kv, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
