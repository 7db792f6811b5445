"""Causal attention whose steps are spread over devices: keys and values travel around a ring.

Liu et al. 2023 (arXiv 2310.01889), in the zig-zag order of `Sharding.time_order`: every device
holds an early and a late half, so each turn of the ring costs all of them the same. A half that
lies wholly in the future of another is not computed.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.sharding import context_size, on_shards, ring_permute

_HEADS = ("batch", "steps", "act_heads", None)
_STEPS = ("batch", "steps")
_NOTHING = -1e30
"""The running maximum before any key was seen; finite, so that differences stay numbers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Keys:
    """What travels: keys and values of one device's steps, and what hides them."""

    k: Any
    v: Any
    segments: Any
    ring_order: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Partial:
    """Attention over the keys seen so far: softmax(x) v = weighted / total (Milakov 2018)."""

    weighted: Any
    """Float32 [B, K, G, T, H]."""
    total: Any
    """Float32 [B, K, G, T]."""
    highest: Any
    """Float32 [B, K, G, T]: the greatest score."""


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B T"],
    ring_order: Int[Array, " T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attends to keys of the same segment and no later position.

    `ring_order` is the position of each query and key. Runs inside `sharding.use` with a context
    axis that divides the sequence evenly.
    """
    turns = context_size()

    def local(
        q: Any, k: Any, v: Any, query_segments: Any, key_segments: Any, ring_order: Any
    ) -> Any:
        B, T, N, H = q.shape
        K = k.shape[2]
        queries = q.reshape(B, T, K, N // K, H)
        state = Partial(
            weighted=jnp.zeros((B, K, N // K, T, H), jnp.float32),
            total=jnp.zeros((B, K, N // K, T), jnp.float32),
            highest=jnp.full((B, K, N // K, T), _NOTHING, jnp.float32),
        )

        def see(state: Partial, keys: Keys) -> Partial:
            return _see_halves(state, queries, query_segments, ring_order, keys, scale)

        def turn(carry: tuple[Partial, Keys], _: None) -> tuple[tuple[Partial, Keys], None]:
            state, keys = carry
            keys = ring_permute(keys)
            return (see(state, keys), keys), None

        keys = Keys(k=k, v=v, segments=key_segments, ring_order=ring_order)
        (state, _), _ = jax.lax.scan(turn, (see(state, keys), keys), None, length=turns - 1)
        mixed = state.weighted / jnp.maximum(state.total, 1e-30)[..., None]
        return jnp.einsum("bkgth->btkgh", mixed).reshape(B, T, N, H).astype(v.dtype)

    return on_shards(
        local,
        [q, k, v, query_segments, key_segments, ring_order],
        [_HEADS, _HEADS, _HEADS, _STEPS, _STEPS, ("steps",)],
        out_axes=_HEADS,
    )


def _see_halves(
    state: Partial,
    queries: Float[Array, "B T K G H"],
    query_segments: Int[Array, "B T"],
    ring_order: Int[Array, " T"],
    keys: Keys,
    scale: float,
) -> Partial:
    """Lets each half of the queries see each half of the keys that is not all in its future."""
    half = ring_order.shape[0] // 2

    @jax.checkpoint
    def see(part: Partial, q: Any, segments: Any, own: Any, keys: Keys) -> Partial:
        visible = (own[:, None] >= keys.ring_order[None])[None] & (
            segments[:, :, None] == keys.segments[:, None, :]
        )
        return _see(part, q, keys, visible, scale)

    parts = []
    for rows in (slice(0, half), slice(half, None)):
        part = jax.tree.map(lambda x, rows=rows: x[:, :, :, rows], state)
        q, segments, own = queries[:, rows], query_segments[:, rows], ring_order[rows]
        for columns in (slice(0, half), slice(half, None)):
            seen = Keys(
                k=keys.k[:, columns],
                v=keys.v[:, columns],
                segments=keys.segments[:, columns],
                ring_order=keys.ring_order[columns],
            )
            is_needed = own[-1] >= seen.ring_order[0]  # slots rise within a half
            part = jax.lax.cond(is_needed, see, lambda part, *_: part, part, q, segments, own, seen)
        parts.append(part)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=3), *parts)


def _see(
    part: Partial,
    q: Float[Array, "B T K G H"],
    keys: Keys,
    visible: Bool[Array, "B T S"],
    scale: float,
) -> Partial:
    """Adds keys to what the queries have seen."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, keys.k, preferred_element_type=jnp.float32)
    mask = visible[:, None, None]
    scores = jnp.where(mask, scores * scale, _NOTHING)
    highest = jnp.maximum(part.highest, jax.lax.stop_gradient(scores.max(axis=-1)))
    kept = jnp.exp(part.highest - highest)
    weights = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0.0)
    added = jnp.einsum(
        "bkgts,bskh->bkgth", weights.astype(q.dtype), keys.v, preferred_element_type=jnp.float32
    )
    return Partial(
        weighted=part.weighted * kept[..., None] + added,
        total=part.total * kept + weights.sum(axis=-1),
        highest=highest,
    )
