"""Attention that computes every score of a dense mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from speechlm2_jax.layers.quantized import Heads, QuantizedArray
from speechlm2_jax.layers.scores import Scores


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Heads,
    v: Heads,
    mask: Bool[Array, "B T S"],
    scores: Scores,
) -> Float[Array, "B T N H"]:
    """Attends to the keys where the mask is True. The window of `scores` is in the mask already.

    Keys and values are [B, S, N_kv, H]; those of a cache may be quantized.
    """
    B, T, N, H = q.shape
    keys, key_scales = _parts(k, q)
    values, value_scales = _parts(v, q)
    N_kv = keys.shape[2]
    # t query, s key, k key/value head, g query head within its group: N = N_kv * G
    grouped = q.reshape(B, T, N_kv, N // N_kv, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    if key_scales is not None:
        logits = logits * key_scales
    # The least finite value, not -inf: softmax over a query without any key must not be NaN.
    masked = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None, :, :], scores.of(logits), masked)
    weights = jax.nn.softmax(logits, axis=-1)
    if value_scales is not None:
        weights = weights * value_scales
    weights = weights.astype(values.dtype)
    # matmul per key/value head, in the cache's order; einsum would transpose V (twice the time)
    mixed = jnp.matmul(weights.reshape(B, N_kv, -1, values.shape[1]), values.swapaxes(1, 2))
    return mixed.reshape(B, N_kv, N // N_kv, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _parts(
    x: Heads, q: Float[Array, "B T N H"]
) -> tuple[Float[Array, "B S N_kv H"], Float[Array, "B N_kv 1 1 S"] | None]:
    """Keys or values without their scales in the dtype of `q`, and the scales.

    Scores and weights are multiplied by the scales. So the matmul reads 8 bits: a cast is part of
    it on accelerators, a product would be an array of its own.
    """
    if not isinstance(x, QuantizedArray):
        return x, None
    scales = x.scales[..., 0].astype(jnp.float32).swapaxes(1, 2)
    return x.values.astype(q.dtype), scales[:, :, None, None]
