"""JAX's splash (flash) attention kernel for TPUs: scores are never written to memory.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) skips blocks of keys that are in the
future of a block of queries. Segment ids hide keys of other segments, masked keys and padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int, Shaped

from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.sharding import on_shards

LANES = 128
"""Block lengths are multiples of this."""
BLOCKS = (512, 256, 128)
PADDING_SEGMENT = -2
"""Segment id of the padding that fills up a block."""
_HEADS = ("batch", "tokens", "act_heads", None)
_TOKENS = ("batch", "tokens")


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N_kv H"],
    v: Float[Array, "B T N_kv H"],
    *,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B T"],
    scores: Scores,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attends to keys of the same segment, at or before the query's position.

    A window counts tokens of the whole sequence: the tokens of a segment must be adjacent.
    `interpret` emulates the kernel where there is no TPU, slowly. Inside `sharding.use` each device
    computes its own sequences and heads; the mesh must divide both.
    """

    def local(
        q: Float[Array, "b T n H"],
        k: Float[Array, "b T n_kv H"],
        v: Float[Array, "b T n_kv H"],
        query_segments: Int[Array, "b T"],
        key_segments: Int[Array, "b T"],
    ) -> Float[Array, "b T n H"]:
        length = q.shape[1]
        kernel = _kernel(length + -length % LANES, q.shape[2], scores, interpret)

        def sequence(
            q: Float[Array, "T n H"],
            k: Float[Array, "T n_kv H"],
            v: Float[Array, "T n_kv H"],
            query_segments: Int[Array, " T"],
            key_segments: Int[Array, " T"],
        ) -> Float[Array, "T n H"]:
            heads = (
                jnp.swapaxes(_padded(x, 0), 0, 1) for x in (q * scores.scale, k, v)
            )  # [N, T, H]
            segments = kernels.SegmentIds(
                q=_padded(query_segments, PADDING_SEGMENT),
                kv=_padded(key_segments, PADDING_SEGMENT),
            )
            mixed = kernel(*heads, segment_ids=segments)
            return jnp.swapaxes(mixed, 0, 1)[:length].astype(v.dtype)

        return jax.vmap(sequence)(q, k, v, query_segments, key_segments)

    return on_shards(
        local,
        [q, k, v, query_segments, key_segments],
        [_HEADS, _HEADS, _HEADS, _TOKENS, _TOKENS],
        out_axes=_HEADS,
    )


def _kernel(length: int, heads: int, scores: Scores, interpret: bool) -> Any:
    block = next(size for size in BLOCKS if length % size == 0)
    shape = (length, length)
    mask = (
        masks.CausalMask(shape)
        if scores.window is None
        else masks.LocalMask(shape, window_size=(scores.window - 1, 0), offset=0)
    )
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        attn_logits_soft_cap=scores.softcap,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _padded(x: Shaped[Array, "T *rest"], value: int) -> Shaped[Array, "T_padded *rest"]:
    """Pads [T, ...] at the end up to a multiple of `LANES`."""
    return jnp.pad(
        x, [(0, -x.shape[0] % LANES)] + [(0, 0)] * (np.ndim(x) - 1), constant_values=value
    )
