"""Self- and cross-attention of the speech decoder: joint projections without bias."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.attention import NOT_A_KEY, AttentionMask, attend
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.dropout import drop_weights, dropout, fold_rngs
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.module import Initializer
from speechlm2_jax.sharding import constrain
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig

BLOCK = 256
"""Queries scored at once where no kernel serves: memory grows with the length, not its square."""
_WEIGHTS_PLACE, _OUTPUT_PLACE = range(2)
default_init: Initializer = jax.nn.initializers.normal(0.02)


def output_init(config: SpeechDecoderConfig) -> Initializer:
    """Draws what each block adds to the residual stream: narrower, the more layers there are."""
    return jax.nn.initializers.normal(0.02 / (2 * config.n_layers) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class SpeechAttentionInputs:
    """What the steps of one call see; the same for all layers."""

    is_real: Bool[Array, "B T"]
    """The steps of this call that are no padding; the others come out as zeros."""
    attention_mask: Bool[Array, "B S"]
    """`is_real`, or with a cache which of its slots others may attend to."""
    offset: Any = None
    """Int32 scalar: the cache's slot of the first step; None without a cache."""
    memory: Any = None
    """Float [B, S', M]: what cross-attention reads; None passes it over."""
    is_memory: Any = None
    """Bool [B, S']: the steps of the memory that are no padding."""


class JointSelfAttention(nnx.Module):
    """Attention among the steps of a row; NeMo's joint weight [3, heads, head width] by D."""

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
        place: SpeechAttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within `x`, or, with a cache, to all that the cache then holds of this layer."""
        q, k, v = _split(self.inputs, x, 3, self.config.sa_n_heads)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.read(layer)
        if self.config.is_causal and (rngs is None or self.config.p_dropout == 0.0):
            mixed = attend(q, k, v, mask=_visible(place), scale=q.shape[-1] ** -0.5)
        else:
            mixed = _mix(
                q,
                k,
                v,
                place.attention_mask,
                is_causal=self.config.is_causal,
                rate=self.config.p_dropout,
                rngs=fold_rngs(rngs, _WEIGHTS_PLACE),
            )
        return _out(self.output, mixed, self.config.p_dropout, rngs), cache


class CrossAttention(nnx.Module):
    """Attention from the steps to a memory, of which they see all that is no padding."""

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
        is_memory: Bool[Array, "B S"],
        rngs: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Reads the memory; where it is all padding, zeros come out."""
        heads = self.config.cross_heads
        q = self.query(constrain(x, "batch", "steps", "act_embed"))
        q = q.reshape(*x.shape[:2], heads, -1)
        k, v = _split(self.memory, memory, 2, heads)
        mixed = _mix(
            constrain(q, "batch", "steps", "act_heads", None),
            k,
            v,
            is_memory,
            is_causal=False,
            rate=self.config.p_dropout,
            rngs=fold_rngs(rngs, _WEIGHTS_PLACE),
        )
        return _out(self.output, mixed, self.config.p_dropout, rngs)


def _joint(d_in: int, width: int, parts: int, rngs: nnx.Rngs) -> Linear:
    # whole on tensor-parallel devices: a cut through the parts together would not be one by heads
    return Linear(
        d_in,
        parts * width,
        axes=(None, "embed"),
        rngs=rngs,
        bias=False,
        init=default_init,
    )


def _split(
    linear: Linear, x: Float[Array, "B T D"], parts: int, heads: int
) -> tuple[Float[Array, "B T N H"], ...]:
    """Applies a joint projection, each part by itself, so that devices share the heads."""
    x = constrain(x, "batch", "steps", "act_embed")
    weight = constrain(linear.weight[...].astype(x.dtype), None, None)
    weight = constrain(weight.reshape(parts, -1, weight.shape[1]), None, "heads", None)
    y = jnp.einsum("btd,pfd->pbtf", x, weight)
    y = y.reshape(*y.shape[:3], heads, -1)  # [P, B, T, N, H]
    return tuple(constrain(part, "batch", "steps", "act_heads", None) for part in y)


def _visible(place: SpeechAttentionInputs) -> AttentionMask:
    return AttentionMask(
        query_segments=jnp.zeros(place.is_real.shape, jnp.int32),
        key_segments=jnp.where(place.attention_mask, 0, NOT_A_KEY),
        offset=place.offset,
    )


def _mix(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    attention_mask: Bool[Array, "B S"],
    *,
    is_causal: bool,
    rate: float,
    rngs: Key[Array, " B"] | None,
) -> Float[Array, "B T N H"]:
    """Attends block by block of queries, with dropout of the weights; softmax in fp32.

    A query that sees no key gives zeros.
    """
    steps = q.shape[1]
    size = min(steps, BLOCK)
    total = -(-steps // size) * size
    padded = jnp.pad(q, ((0, 0), (0, total - steps), (0, 0), (0, 0)))

    def block(first: Int[Array, ""] | int) -> Float[Array, "B size N H"]:
        part = jax.lax.dynamic_slice_in_dim(padded, first, size, axis=1)
        rows = first + jnp.arange(size)
        scores = jnp.einsum("btnh,bsnh->bnts", part, k, preferred_element_type=jnp.float32)
        mask = attention_mask[:, None, None, :]
        if is_causal:
            mask = mask & (jnp.arange(k.shape[1])[None, :] <= rows[:, None])[None, None]
        blocked = jnp.finfo(jnp.float32).min
        weights = jax.nn.softmax(jnp.where(mask, scores * q.shape[-1] ** -0.5, blocked), axis=-1)
        weights = drop_weights(jnp.where(mask, weights, 0.0), rate, rngs, rows)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)

    if size == total:
        return block(0)
    blocks = jax.lax.map(jax.checkpoint(block), jnp.arange(0, total, size))
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape[0], total, *q.shape[2:])[:, :steps]


def _out(
    linear: Linear, mixed: Float[Array, "B T N H"], rate: float, rngs: Key[Array, " B"] | None
) -> Float[Array, "B T D"]:
    mixed = constrain(mixed, "batch", "steps", "act_heads", None)
    out = linear(mixed.reshape(*mixed.shape[:2], -1))  # [B, T, D]
    out = constrain(out, "batch", "steps", "act_embed")
    return dropout(out, rate, fold_rngs(rngs, _OUTPUT_PLACE))
