"""Self- and cross-attention of the speech decoder: joint q, k, v projections without bias."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask, attend
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.dropout import drop_weights, dropout, fold_rngs
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.module import Initializer
from speechlm2_jax.layers.words import floats
from speechlm2_jax.sharding import constrain
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig

BLOCK = 256
"""Queries scored at once outside attention kernels: memory is then linear in the length."""
_WEIGHTS_RNG, _OUTPUT_RNG = range(2)
default_init: Initializer = jax.nn.initializers.normal(0.02)


def output_init(config: SpeechDecoderConfig) -> Initializer:
    """Initializes output projections to the residual stream: std 0.02 / sqrt(2 n_layers)."""
    return jax.nn.initializers.normal(0.02 / (2 * config.n_layers) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class SpeechAttentionInputs:
    """Masks, cache offset and encoder memory of one call, shared by all layers."""

    is_real: Bool[Array, "B T"]
    """False at padding, whose output is zeros."""
    attention_mask: Bool[Array, "B S"]
    """True where a key may be attended to: `is_real` or, with a KV cache, its key mask."""
    offset: Int[Array, ""] | Int[Array, " B"] | None = None
    """Int32 scalar or [B]: the cache position of the first query; None without a cache."""
    memory: Float[Array, "B S_memory M"] | None = None
    """Float [B, S', M]: keys and values of cross-attention (`memory` as in torch's
    TransformerDecoder); None skips cross-attention."""
    memory_mask: Any = None
    """Bool [B, S']: False at padding of the memory."""


class JointSelfAttention(nnx.Module):
    """Self-attention with NeMo's joint q, k, v weight [3 * N * H, D]."""

    def __init__(self, config: SpeechDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.d_model
        self.inputs = _joint(width, width, 3, rngs)
        self.output = Linear(
            width,
            width,
            axes=("embed", "heads"),
            rngs=rngs,
            bias=False,
            init=output_init(config),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_inputs: SpeechAttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within `x` or, with a KV cache, to all cached positions, `x` included."""
        q, k, v = _split(self.inputs, x, 3, self.config.sa_n_heads)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cast(tuple[Array, Array], cache.read(layer))  # this cache is not quantized
        if self.config.is_causal and (rngs is None or self.config.p_dropout == 0.0):
            attended = attend(
                q, k, v, mask=_attention_mask(attention_inputs), scale=q.shape[-1] ** -0.5
            )
        else:
            attended = _attend_in_blocks(
                q,
                k,
                v,
                attention_inputs.attention_mask,
                is_causal=self.config.is_causal,
                rate=self.config.p_dropout,
                rngs=fold_rngs(rngs, _WEIGHTS_RNG),
            )
        return _out(self.output, attended, self.config.p_dropout, rngs), cache


class CrossAttention(nnx.Module):
    """Attention from the decoder's positions to all real positions of a memory."""

    def __init__(self, config: SpeechDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.cross_heads * config.cross_head_width
        self.query = Linear(
            config.d_model,
            width,
            axes=("heads", "embed"),
            rngs=rngs,
            bias=False,
            init=default_init,
        )
        self.memory = _joint(config.memory_width, width, 2, rngs)
        self.output = Linear(
            width,
            config.d_model,
            axes=("embed", "heads"),
            rngs=rngs,
            bias=False,
            init=output_init(config),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S M"],
        memory_mask: Bool[Array, "B S"],
        rngs: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends to the memory; a memory that is all padding gives zeros."""
        heads = self.config.cross_heads
        q = self.query(constrain(x, "batch", "tokens", "act_embed"))
        q = q.reshape(*x.shape[:2], heads, -1)
        k, v = _split(self.memory, memory, 2, heads)
        attended = _attend_in_blocks(
            constrain(q, "batch", "tokens", "act_heads", None),
            k,
            v,
            memory_mask,
            is_causal=False,
            rate=self.config.p_dropout,
            rngs=fold_rngs(rngs, _WEIGHTS_RNG),
        )
        return _out(self.output, attended, self.config.p_dropout, rngs)


def _joint(d_in: int, width: int, count: int, rngs: nnx.Rngs) -> Linear:
    # not sharded over tensor-parallel devices: the joint axis is not split along heads
    return Linear(
        d_in,
        count * width,
        axes=(None, "embed"),
        rngs=rngs,
        bias=False,
        init=default_init,
    )


def _split(
    linear: Linear, x: Float[Array, "B T D"], count: int, heads: int
) -> tuple[Float[Array, "B T N H"], ...]:
    """Splits a joint projection into `count` outputs, so that each is sharded along heads.

    Einsum letters: p which output (q, k, v), f its features N * H.
    """
    x = constrain(x, "batch", "tokens", "act_embed")
    weight = constrain(floats(linear.weight[...], x.dtype), None, None)
    weight = constrain(weight.reshape(count, -1, weight.shape[1]), None, "heads", None)
    y = jnp.einsum("btd,pfd->pbtf", x, weight)
    y = y.reshape(*y.shape[:3], heads, -1)  # [P, B, T, N, H]
    return tuple(constrain(part, "batch", "tokens", "act_heads", None) for part in y)


def _attention_mask(attention_inputs: SpeechAttentionInputs) -> AttentionMask:
    return AttentionMask(
        query_segments=jnp.zeros(attention_inputs.is_real.shape, jnp.int32),
        key_segments=jnp.where(attention_inputs.attention_mask, 0, MASKED_KEY),
        offset=attention_inputs.offset,
    )


def _attend_in_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    attention_mask: Bool[Array, "B S"],
    *,
    is_causal: bool,
    rate: float,
    rngs: Key[Array, " B"] | None,
) -> Float[Array, "B T N H"]:
    """Attends block by block of queries, with dropout of the attention weights; softmax in fp32.

    A query without any key gives zeros. Blocks are recomputed in the backward pass.
    """
    length = q.shape[1]
    block_size = min(length, BLOCK)
    padded_length = -(-length // block_size) * block_size
    padded = jnp.pad(q, ((0, 0), (0, padded_length - length), (0, 0), (0, 0)))

    def attend_block(start: Int[Array, ""] | int) -> Float[Array, "B size N H"]:
        block_queries = jax.lax.dynamic_slice_in_dim(padded, start, block_size, axis=1)
        query_positions = start + jnp.arange(block_size)
        scores = jnp.einsum("btnh,bsnh->bnts", block_queries, k, preferred_element_type=jnp.float32)
        mask = attention_mask[:, None, None, :]
        if is_causal:
            mask = mask & (jnp.arange(k.shape[1])[None, :] <= query_positions[:, None])[None, None]
        masked_score = jnp.finfo(jnp.float32).min
        weights = jax.nn.softmax(
            jnp.where(mask, scores * q.shape[-1] ** -0.5, masked_score), axis=-1
        )
        weights = drop_weights(jnp.where(mask, weights, 0.0), rate, rngs, query_positions)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)

    if block_size == padded_length:
        return attend_block(0)
    blocks = jax.lax.map(jax.checkpoint(attend_block), jnp.arange(0, padded_length, block_size))
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape[0], padded_length, *q.shape[2:])[:, :length]


def _out(
    linear: Linear, attended: Float[Array, "B T N H"], rate: float, rngs: Key[Array, " B"] | None
) -> Float[Array, "B T D"]:
    attended = constrain(attended, "batch", "tokens", "act_heads", None)
    out = linear(attended.reshape(*attended.shape[:2], -1))  # [B, T, D]
    out = constrain(out, "batch", "tokens", "act_embed")
    return dropout(out, rate, fold_rngs(rngs, _OUTPUT_RNG))
