"""Attention in blocks, for rows in which every key is near its query; on any platform.

Of rows of T tokens plain attention computes T x T scores. Where no query attends further back than
`reach` tokens (packed rows whose longest conversation is known, sliding windows), a block of
queries needs the keys of its own block and of the few before it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from speechlm2_jax.layers.dense_attention import dense_attention
from speechlm2_jax.layers.scores import Scores

SHORTEST_BLOCK, LONGEST_BLOCK = 64, 256
"""Tokens of a block. Longer ones compute more masked scores; shorter ones copy more keys."""


def blocks_of(reach: int) -> tuple[int, int]:
    """Tokens of a block, and how many blocks before its own have keys of its queries."""
    size = -(-reach // (4 * SHORTEST_BLOCK)) * SHORTEST_BLOCK
    size = min(max(size, SHORTEST_BLOCK), LONGEST_BLOCK)
    return size, -(-(reach - 1) // size)


def saves(tokens: int, reach: int | None) -> bool:
    """Whether blocks compute at most half of the scores of rows of so many tokens."""
    if reach is None:
        return False
    size, before = blocks_of(reach)
    return 2 * (before + 1) * size <= tokens


def block_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N_kv H"],
    v: Float[Array, "B T N_kv H"],
    *,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B T"],
    scores: Scores,
    reach: int,
    masked_key: int,
) -> Float[Array, "B T N H"]:
    """Attends to keys of the same segment, at or before the query's position.

    A window counts tokens of the whole sequence: the tokens of a segment must be adjacent. `reach`
    promises that a query at index t needs no key before index t - reach + 1. `masked_key` is the
    segment id that no query has.
    """
    B, T, N, H = q.shape
    size, before = blocks_of(reach)
    count = -(-T // size)

    def split(x: Shaped[Array, "B T *rest"], value: int) -> Shaped[Array, "B n s *rest"]:
        widths = [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, widths, constant_values=value)
        return padded.reshape(B, count, size, *x.shape[2:])

    def seen(x: Shaped[Array, "B T *rest"], value: int) -> Shaped[Array, "Bn S *rest"]:
        """The keys before and in each block."""
        blocks = split(x, value)
        widths = [(0, 0), (before, 0)] + [(0, 0)] * (x.ndim - 1)
        padded = jnp.pad(blocks, widths, constant_values=value)
        shifted = [padded[:, n : n + count] for n in range(before + 1)]
        return jnp.concatenate(shifted, axis=2).reshape(B * count, -1, *x.shape[2:])

    queries = split(query_segments, masked_key).reshape(B * count, size)
    distance = before * size + jnp.arange(size)[:, None] - jnp.arange((before + 1) * size)[None]
    near = distance >= 0
    if scores.window is not None:
        near &= distance < scores.window
    keys = seen(key_segments, masked_key)
    mask = near[None] & (queries[:, :, None] == keys[:, None, :]) & (keys != masked_key)[:, None]
    blocks = split(q, 0).reshape(B * count, size, N, H)
    mixed = dense_attention(blocks, seen(k, 0), seen(v, 0), mask, scores)
    return mixed.reshape(B, count * size, N, H)[:, :T]
