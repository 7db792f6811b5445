"""Ring attention: causal attention over a sequence that is sharded over devices.

Liu et al. 2023 (arXiv 2310.01889). Each device keeps its queries while keys and values rotate
around the ring of devices. In the zig-zag order of `Sharding.time_order` every device holds an
early and a late part of the sequence, so each rotation costs all devices the same. A part of the
keys is skipped if it is in the future of all queries of a part.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import context_size, on_shards, ring_permute

_HEADS = ("batch", "tokens", "act_heads", None)
_TOKENS = ("batch", "tokens")
_NO_SCORE = -1e30
"""Running maximum before the first key; finite, so that differences are never NaN."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Keys:
    """What rotates: keys and values of one device, their segment ids and positions."""

    k: Float[Array, "B S N_kv H"]
    v: Float[Array, "B S N_kv H"]
    segments: Int[Array, "B S"]
    ring_order: Int[Array, " S"]


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Partial:
    """Online softmax over the keys so far: output = weighted / total (Milakov 2018), in fp32.

    G is the number of query heads per key/value head: N = N_kv * G.
    """

    weighted: Float[Array, "B N_kv G T H"]
    """Sum of exp(score - highest) * value."""
    total: Float[Array, "B N_kv G T"]
    """Sum of exp(score - highest)."""
    highest: Float[Array, "B N_kv G T"]
    """The greatest score so far."""


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N_kv H"],
    v: Float[Array, "B T N_kv H"],
    *,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B T"],
    ring_order: Int[Array, " T"],
    scores: Scores,
) -> Float[Array, "B T N H"]:
    """Attends to keys of the same segment, at or before the query's position, within the window.

    `ring_order` gives the position of each query and key. Needs `sharding.use` with a context axis
    that divides the sequence evenly.
    """
    size = context_size()

    def local(
        q: Float[Array, "b t n H"],
        k: Float[Array, "b t n_kv H"],
        v: Float[Array, "b t n_kv H"],
        query_segments: Int[Array, "b t"],
        key_segments: Int[Array, "b t"],
        ring_order: Int[Array, " t"],
    ) -> Float[Array, "b t n H"]:
        B, T, N, H = q.shape
        N_kv = k.shape[2]
        queries = q.reshape(B, T, N_kv, N // N_kv, H)
        state = Partial(
            weighted=jnp.zeros((B, N_kv, N // N_kv, T, H), jnp.float32),
            total=jnp.zeros((B, N_kv, N // N_kv, T), jnp.float32),
            highest=jnp.full((B, N_kv, N // N_kv, T), _NO_SCORE, jnp.float32),
        )

        def add(state: Partial, keys: Keys) -> Partial:
            return _add_halves(state, queries, query_segments, ring_order, keys, scores)

        def rotate(carry: tuple[Partial, Keys], _: None) -> tuple[tuple[Partial, Keys], None]:
            state, keys = carry
            keys = ring_permute(keys)
            return (add(state, keys), keys), None

        keys = Keys(k=k, v=v, segments=key_segments, ring_order=ring_order)
        (state, _), _ = jax.lax.scan(rotate, (add(state, keys), keys), None, length=size - 1)
        mixed = state.weighted / jnp.maximum(state.total, 1e-30)[..., None]
        return jnp.einsum("bkgth->btkgh", mixed).reshape(B, T, N, H).astype(v.dtype)

    return on_shards(
        local,
        [q, k, v, query_segments, key_segments, ring_order],
        [_HEADS, _HEADS, _HEADS, _TOKENS, _TOKENS, ("tokens",)],
        out_axes=_HEADS,
    )


def _add_halves(
    state: Partial,
    queries: Float[Array, "B T N_kv G H"],
    query_segments: Int[Array, "B T"],
    ring_order: Int[Array, " T"],
    keys: Keys,
    scores: Scores,
) -> Partial:
    """Adds each half of the keys to each half of the queries, unless all of it is masked."""
    half = ring_order.shape[0] // 2

    @jax.checkpoint
    def add(
        part: Partial,
        q: Float[Array, "B t N_kv G H"],
        segments: Int[Array, "B t"],
        positions: Int[Array, " t"],
        keys: Keys,
    ) -> Partial:
        mask = (positions[:, None] >= keys.ring_order[None])[None] & (
            segments[:, :, None] == keys.segments[:, None, :]
        )
        if scores.window is not None:
            mask &= (positions[:, None] - keys.ring_order[None] < scores.window)[None]
        return _add(part, q, keys, mask, scores)

    parts = []
    for query_half in (slice(0, half), slice(half, None)):
        part = jax.tree.map(lambda x, half=query_half: x[:, :, :, half], state)
        q, segments = queries[:, query_half], query_segments[:, query_half]
        positions = ring_order[query_half]
        for key_half in (slice(0, half), slice(half, None)):
            some = Keys(
                k=keys.k[:, key_half],
                v=keys.v[:, key_half],
                segments=keys.segments[:, key_half],
                ring_order=keys.ring_order[key_half],
            )
            # positions are in order within a half
            is_needed = positions[-1] >= some.ring_order[0]
            if scores.window is not None:
                is_needed &= positions[0] - some.ring_order[-1] < scores.window
            part = jax.lax.cond(
                is_needed, add, lambda part, *_: part, part, q, segments, positions, some
            )
        parts.append(part)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=3), *parts)


def _add(
    part: Partial,
    q: Float[Array, "B T N_kv G H"],
    keys: Keys,
    mask: Bool[Array, "B T S"],
    scores: Scores,
) -> Partial:
    """One update of the online softmax. Letters: t query, s key, k key/value head, g its group."""
    products = jnp.einsum("btkgh,bskh->bkgts", q, keys.k, preferred_element_type=jnp.float32)
    mask = mask[:, None, None]
    scored = jnp.where(mask, scores.of(products), _NO_SCORE)
    highest = jnp.maximum(part.highest, jax.lax.stop_gradient(scored.max(axis=-1)))
    rescale = jnp.exp(part.highest - highest)
    weights = jnp.where(mask, jnp.exp(scored - highest[..., None]), 0.0)
    added = jnp.einsum(
        "bkgts,bskh->bkgth", weights.astype(q.dtype), keys.v, preferred_element_type=jnp.float32
    )
    return Partial(
        weighted=part.weighted * rescale[..., None] + added,
        total=part.total * rescale + weights.sum(axis=-1),
        highest=highest,
    )
