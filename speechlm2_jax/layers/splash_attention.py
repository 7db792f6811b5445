"""Causal attention as JAX's TPU kernel: no score is ever written to memory.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) skips blocks in the future of their
queries. It is told which steps are of one segment; a step that nobody may see is of none.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from speechlm2_jax.sharding import on_shards

LANES = 128
"""What the kernel's blocks of steps are multiples of."""
BLOCKS = (512, 256, 128)
NO_QUERY = -2
"""Segment of the steps that fill up a block."""
_HEADS = ("batch", "steps", "act_heads", None)
_STEPS = ("batch", "steps")


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B T"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attends to keys of the same segment and no later step.

    `interpret` runs it where there is no TPU, slowly. Inside `sharding.use` each device computes
    its own rows and heads, which the mesh must divide.
    """

    def local(q: Any, k: Any, v: Any, query_segments: Any, key_segments: Any) -> Any:
        steps = q.shape[1]
        kernel = _kernel(steps + -steps % LANES, q.shape[2], interpret)

        def row(q: Any, k: Any, v: Any, query_segments: Any, key_segments: Any) -> Any:
            heads = (jnp.swapaxes(_filled(x, 0), 0, 1) for x in (q * scale, k, v))  # [N, T, H]
            segments = kernels.SegmentIds(
                q=_filled(query_segments, NO_QUERY), kv=_filled(key_segments, NO_QUERY)
            )
            mixed = kernel(*heads, segment_ids=segments)
            return jnp.swapaxes(mixed, 0, 1)[:steps].astype(v.dtype)

        return jax.vmap(row)(q, k, v, query_segments, key_segments)

    return on_shards(
        local,
        [q, k, v, query_segments, key_segments],
        [_HEADS, _HEADS, _HEADS, _STEPS, _STEPS],
        out_axes=_HEADS,
    )


def _kernel(steps: int, heads: int, interpret: bool) -> Any:
    block = next(size for size in BLOCKS if steps % size == 0)
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([masks.CausalMask((steps, steps))] * heads),
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


def _filled(x: Any, value: int) -> Any:
    """Adds steps to the end of [T, ...] up to a multiple of `LANES`."""
    return jnp.pad(
        x, [(0, -x.shape[0] % LANES)] + [(0, 0)] * (np.ndim(x) - 1), constant_values=value
    )
