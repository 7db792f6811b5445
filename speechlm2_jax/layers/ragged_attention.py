"""JAX's kernel for sequences of different lengths on TPUs: it reads the pages that hold tokens.

The kernel (`jax.experimental.pallas.ops.tpu.ragged_paged_attention`) copies a block of pages to the
chip and attends to it while it copies the next. The scores are never written to memory.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as kernel
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.sharding import on_shards

PAGE_TOKENS = 128
PAGES_PER_BLOCK = 2
QUERIES_PER_BLOCK = 8
"""The kernel's own table of block sizes is for JAX's default device, which is not the one that a
program is compiled for ahead of time."""
LANES = 128
"""Width of a head. The kernel reads every other row of a page, which Mosaic has for 128 only."""
PAGES_AXES = (None, "batch", None, "act_heads", None)
"""Of `Pages.of_all`."""
_HEADS = ("batch", "tokens", "act_heads", None)


class Pages(NamedTuple):
    """The keys and values of one layer, in the array of all layers."""

    of_all: Float[Array, "L B S M H"]
    """M = 2 N_kv: the key and the value of each head side by side. S is whole pages."""
    layer: Int[Array, ""] | int
    lengths: Int[Array, " B"]
    """Tokens of each sequence, the new one included; at least 1."""


def tiles_heads(kv_heads: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel can read keys and values of so many heads on one device."""
    packed = 4 // dtype.itemsize  # numbers in 32 bits
    rows = 2 * kv_heads // packed
    return 2 * kv_heads % packed == 0 and (rows in (1, 2, 4) or rows % 8 == 0)


def ragged_attention(
    q: Float[Array, "B 1 N H"], pages: Pages, scores: Scores
) -> Float[Array, "B 1 N H"]:
    """One new token of each sequence attends to the sequence's tokens in the pages.

    Inside `sharding.use` each device computes its own sequences and heads; the mesh must divide
    both.
    """

    def local(
        q: Float[Array, "b 1 n H"],
        kept: Float[Array, "L b S m H"],
        layer: Int[Array, ""],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b 1 n H"]:
        _, batch, capacity, heads, width = kept.shape
        count = capacity // PAGE_TOKENS
        first = (layer * batch + jnp.arange(batch, dtype=jnp.int32)) * count
        mixed = kernel(
            q[:, 0],
            # pages of all layers: a slice of one layer would be a copy
            kept.reshape(-1, PAGE_TOKENS, heads, width),
            lengths,
            first[:, None] + jnp.arange(count, dtype=jnp.int32)[None],
            jnp.arange(batch + 1, dtype=jnp.int32),
            jnp.array([batch], jnp.int32),
            sm_scale=scores.scale,
            soft_cap=scores.softcap,
            num_kv_pages_per_block=min(PAGES_PER_BLOCK, count),
            num_queries_per_block=min(QUERIES_PER_BLOCK, batch),
        )
        return mixed[:, None]

    layer = jnp.asarray(pages.layer, jnp.int32)
    axes = (_HEADS, PAGES_AXES, (), ("batch",))
    return on_shards(local, (q, pages.of_all, layer, pages.lengths), axes, _HEADS)
