"""What the TPU's kernel for ragged sequences computes, written out for a CPU."""

import jax
import jax.numpy as jnp


def written_out(q, pages, lengths, indices, starts, count, *, sm_scale, soft_cap, **sizes):
    """One query [B, N, H] of each sequence attends to its first `lengths` keys in the pages."""
    batch, heads, _ = q.shape
    own = pages[indices].reshape(batch, -1, *pages.shape[2:])  # [B, S, 2 N_kv, H]
    keys, values = (
        jnp.repeat(own[:, :, first::2], 2 * heads // own.shape[2], axis=2) for first in (0, 1)
    )
    scores = sm_scale * jnp.einsum("bnh,bsnh->bns", q, keys)
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    is_seen = jnp.arange(own.shape[1])[None] < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(is_seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bns,bsnh->bnh", weights, values).astype(q.dtype)
