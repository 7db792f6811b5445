"""Scaled dot-product attention: one function, whatever computes it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.ring_attention import ring_attention
from speechlm2_jax.layers.splash_attention import splash_attention
from speechlm2_jax.sharding import context_size, platform

NOT_A_KEY = -1
"""Key segment that no query has."""
SPLASH_STEPS = 256
"""From so many steps on a TPU computes whole rows by its kernel; fewer fill its blocks badly."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Which keys a query may attend to: same segment, and no later slot.

    Kept as structure rather than as a dense mask, so that a kernel can skip whole blocks. Queries
    take consecutive slots from `offset` (0 for None, which says that queries and keys are the same
    steps) and keys the slots from 0, unless `ring_order` says which.
    """

    query_segments: Any
    """Int32 [B, T]."""
    key_segments: Any
    """Int32 [B, S]; `NOT_A_KEY` hides a key from everyone."""
    offset: Any = None
    """Int32 scalar: the slot of the first query; None without a cache."""
    ring_order: Any = None
    """Int32 [T]: the slots of queries and keys where both lie in another order (a ring)."""

    def dense(self) -> Bool[Array, "B T S"]:
        """Writes the mask out; True where query t may attend to key s."""
        queries: Int[Array, "B T"] = self.query_segments
        keys: Int[Array, "B S"] = self.key_segments
        if self.ring_order is None:
            query_order = (0 if self.offset is None else self.offset) + jnp.arange(queries.shape[1])
            key_order = jnp.arange(keys.shape[1])
        else:
            query_order = key_order = jnp.asarray(self.ring_order)
        causal = key_order[None, :] <= query_order[:, None]  # [T, S]
        return causal[None, :, :] & (queries[:, :, None] == keys[:, None, :])


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attends with N query heads in K groups that share a key and value head; softmax in fp32.

    A query that sees no key gives a finite value, which nothing may use. This is the place where a
    fused kernel is chosen, by the platform of the mesh's devices and never by the default backend.
    """
    if mask.ring_order is not None and context_size() > 1:
        return ring_attention(
            q,
            k,
            v,
            query_segments=mask.query_segments,
            key_segments=mask.key_segments,
            ring_order=jnp.asarray(mask.ring_order),
            scale=scale,
        )
    is_whole = mask.ring_order is None and mask.offset is None
    if is_whole and q.shape[1] >= SPLASH_STEPS and platform() == "tpu":
        return splash_attention(
            q,
            k,
            v,
            query_segments=mask.query_segments,
            key_segments=mask.key_segments,
            scale=scale,
        )
    return _attend_dense(q, k, v, mask.dense(), scale)


def _attend_dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    K = k.shape[2]
    groups = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=jnp.float32)
    # The least finite value, not -inf: a row without keys must not become NaN.
    blocked = jnp.finfo(jnp.float32).min
    logits = jnp.where(mask[:, None, None, :, :], logits * scale, blocked)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    # one matrix per key head, as a cache holds them; einsum would turn each round (twice the time)
    mixed = jnp.matmul(weights.reshape(B, K, -1, v.shape[1]), v.swapaxes(1, 2))
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
