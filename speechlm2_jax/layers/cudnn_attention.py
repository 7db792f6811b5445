"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.sharding import on_shards

WIDEST_HEAD = 256
_HEADS = ("batch", "tokens", "act_heads", None)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N_kv H"],
    v: Float[Array, "B T N_kv H"],
    *,
    lengths: Int[Array, " B"],
    scores: Scores,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Causal attention within the first `lengths` tokens of each row; scores stay on the chip.

    cuDNN knows no segments, no soft cap and no fp32. The output after a row's length is not to be
    used. `implementation="xla"` computes the same where there is no GPU. Inside `sharding.use` each
    device computes its own sequences and heads; the mesh must divide both.
    """

    def local(
        q: Float[Array, "b T n H"],
        k: Float[Array, "b T n_kv H"],
        v: Float[Array, "b T n_kv H"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b T n H"]:
        real = jnp.maximum(lengths, 1)  # a row without tokens would divide by zero
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scores.scale,
            is_causal=True,
            query_seq_lengths=real,
            key_value_seq_lengths=real,
            local_window_size=None if scores.window is None else (scores.window - 1, 0),
            implementation=implementation,
        )

    return on_shards(local, (q, k, v, lengths), (_HEADS, _HEADS, _HEADS, ("batch",)), _HEADS)
