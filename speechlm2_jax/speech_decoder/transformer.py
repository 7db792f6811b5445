"""The transformer inside the speech decoder (NeMo's transformer_2501): pre-norm, convolutional."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.dropout import dropout, fold_rngs
from speechlm2_jax.layers.module import param
from speechlm2_jax.layers.norms import LayerNorm
from speechlm2_jax.layers.sink_cache import SinkCache
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain
from speechlm2_jax.speech_decoder.attention import (
    CrossAttention,
    JointSelfAttention,
    SpeechAttentionInputs,
    default_init,
)
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.feed_forward import ConvFeedForward, ConvState

PADDING = 64
"""How far a padded batch may exceed the learnt positions; real lengths are checked elsewhere."""
_INPUT_RNG, _LAYERS_RNG, _OUTPUT_RNG = range(3)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class TransformerState:
    """State of incremental decoding, of fixed shape: KV cache and convolution inputs."""

    cache: KVCache
    conv_state: ConvState
    """[L, B, k - 1, ...]."""


Carry = tuple[Array, KVCache | None]
"""The residual stream and the cache."""


class TransformerOutput(NamedTuple):
    """Output for the new positions, and the new state."""

    hidden: Float[Array, "B T D"]
    state: TransformerState


class Layer(nnx.Module):
    """Pre-norm residual layer: self-attention, optional cross-attention, feed-forward."""

    def __init__(self, config: SpeechDecoderConfig, *, rngs: nnx.Rngs):
        def norm(width: int) -> LayerNorm:
            return LayerNorm(width, rngs=rngs, bias=False)

        has_memory = config.has_xattn
        self.attention_norm = norm(config.d_model)
        self.attention = JointSelfAttention(config, rngs=rngs)
        self.cross_norm = norm(config.d_model) if has_memory else None
        self.cross_attention = CrossAttention(config, rngs=rngs) if has_memory else None
        has_memory_norm = has_memory and config.apply_norm_to_cond
        self.memory_norm = norm(config.memory_width) if has_memory_norm else None
        self.feed_forward_norm = norm(config.d_model)
        self.feed_forward = ConvFeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attention_inputs: SpeechAttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        conv_state: ConvState | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, ConvState | None]:
        """Runs one layer; the output is zero at padding."""
        update, cache = self.attention(
            self.attention_norm(x),
            attention_inputs,
            rngs=fold_rngs(rngs, 0),
            cache=cache,
            layer=layer,
        )
        x = x + update
        if attention_inputs.memory is not None and self.cross_attention and self.cross_norm:
            memory = (
                attention_inputs.memory
                if self.memory_norm is None
                else self.memory_norm(attention_inputs.memory)
            )
            x = x + self.cross_attention(
                self.cross_norm(x), memory, attention_inputs.memory_mask, fold_rngs(rngs, 1)
            )
        update, conv_state = self.feed_forward(
            self.feed_forward_norm(x),
            attention_inputs.is_real,
            rngs=fold_rngs(rngs, 2),
            conv_state=conv_state,
        )
        x = jnp.where(attention_inputs.is_real[..., None], x + update, jnp.zeros((), x.dtype))
        return constrain(x, "batch", "time", "act_embed"), cache, conv_state


class Transformer(nnx.Module):
    """A stack of layers over [B, T, D]: causal or not, with or without cross-attention."""

    def __init__(self, config: SpeechDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = (config.max_length_causal_mask, config.d_model)
        self.positions = (
            param(rngs, table, (None, "embed"), default_init)
            if config.use_learnable_pos_emb
            else None
        )
        self.layers = stack(lambda rngs: Layer(config, rngs=rngs), config.n_layers, rngs)
        self.norm = (
            LayerNorm(config.d_model, rngs=rngs, bias=False) if config.apply_norm_out else None
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        memory: Float[Array, "B S M"] | None = None,
        memory_mask: Bool[Array, "B S"] | None = None,
        rngs: Key[Array, " B"] | None = None,
        remat: RematPolicy = "full",
    ) -> Float[Array, "B T D"]:
        """Transforms whole sequences, in the dtype of `x`. The masks are False at padding.

        The output is zero at padding, and padding has no influence. Given `rngs`, one key per
        sequence, dropout is on. `remat` sets what the backward pass recomputes. Raises ValueError
        if T exceeds the learnt positions by more than PADDING.
        """
        attention_inputs = _attention_inputs(x, mask, memory, memory_mask)
        x, _, _ = self._run(x, attention_inputs, rngs=rngs, remat=remat)
        return self._finalize(x, rngs)

    def layer_outputs(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        memory: Float[Array, "B S M"] | None = None,
        memory_mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "L B T D"]:
        """Computes the residual stream after each layer, before the final norm."""
        attention_inputs = _attention_inputs(x, mask, memory, memory_mask)
        return self._run(x, attention_inputs, emit=lambda x: x)[2][0]

    def new_state(
        self, batch: int, capacity: int, dtype: DTypeLike, *, sinks: int | None = None
    ) -> TransformerState:
        """Makes the state of `extend` for `capacity` positions of `batch` sequences.

        With `sinks` a sequence may go on without end: see `layers/sink_cache.py`. Raises
        ValueError if the layers are not causal, or if `capacity` exceeds the learnt positions by
        more than PADDING.
        """
        c = self.config
        if not c.is_causal:
            raise ValueError("model.speech_decoder.is_causal: incremental decoding needs true")
        self._check_length(capacity)
        heads = (c.sa_n_heads, c.d_model // c.sa_n_heads)

        def history(width: int) -> Array:
            zeros = jnp.zeros((c.n_layers, batch, c.kernel_size - 1, width), dtype)
            return constrain(zeros, None, "batch", None, None)

        cache = KVCache.empty((c.n_layers, batch, capacity, *heads), dtype)
        if sinks is not None:
            cache = SinkCache.around(cache, sinks, has_positions=False)
        return TransformerState(
            cache=cache,
            conv_state=ConvState(hidden=history(c.d_model), output=history(c.d_ffn)),
        )

    def extend(
        self,
        x: Float[Array, "B T D"],
        state: TransformerState,
        *,
        mask: Bool[Array, "B T"] | None = None,
        memory: Float[Array, "B S M"] | None = None,
        memory_mask: Bool[Array, "B S"] | None = None,
    ) -> TransformerOutput:
        """Decodes T further positions of every sequence. Equals `__call__` on all at once.

        The cache must have T free positions; the caller counts them. The memory's keys and values
        are computed again on every call.
        """
        is_real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        cache = state.cache.reserve(is_real)
        attention_inputs = _attention_inputs(x, is_real, memory, memory_mask, cache)
        x, cache, (_, conv_state) = self._run(
            x, attention_inputs, cache=cache, conv_state=state.conv_state
        )
        if isinstance(cache, SinkCache):  # sequences whose position is padding keep their state
            old = state.conv_state
            conv_state = jax.tree.map(partial(_where_real, is_real), conv_state, old)
        state = TransformerState(cache=cache.advance(x.shape[1]), conv_state=conv_state)
        return TransformerOutput(self._finalize(x, None), state)

    def _run(
        self,
        x: Float[Array, "B T D"],
        attention_inputs: SpeechAttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        conv_state: ConvState | None = None,
        remat: RematPolicy = "none",
        emit: Callable[[Array], PyTree] = lambda x: None,
    ) -> tuple[Array, Any, Any]:
        x = self._with_positions(
            x, 0 if attention_inputs.offset is None else attention_inputs.offset
        )
        x = dropout(x, self.config.p_dropout, fold_rngs(rngs, _INPUT_RNG))
        # where(), not a product with the mask: a NaN in the padding must not pass
        x = jnp.where(attention_inputs.is_real[..., None], x, jnp.zeros((), x.dtype))
        layer_rngs = fold_rngs(rngs, _LAYERS_RNG)

        # The cache is a scan carry, not an xs/ys: each layer then updates its part in place.
        def body(
            layer: Layer, carry: Carry, inputs: tuple[Array, ConvState | None]
        ) -> tuple[Carry, tuple[PyTree, ConvState | None]]:
            (x, cache), (index, conv_state) = carry, inputs
            x, cache, conv_state = layer(
                x,
                attention_inputs,
                rngs=fold_rngs(layer_rngs, index),
                cache=cache,
                conv_state=conv_state,
                layer=index,
            )
            return (x, cache), (emit(x), conv_state)

        x = constrain(x, "batch", "time", "act_embed")
        xs = (jnp.arange(self.config.n_layers), conv_state)
        (x, cache), emitted = scan_layers(self.layers, body, (x, cache), xs, remat=remat)
        return x, cache, emitted

    def _finalize(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None
    ) -> Float[Array, "B T D"]:
        x = x if self.norm is None else self.norm(x)
        return dropout(x, self.config.p_dropout_out, fold_rngs(rngs, _OUTPUT_RNG))

    def _with_positions(
        self, x: Float[Array, "B T D"], offset: Int[Array, ""] | Int[Array, " B"] | int
    ) -> Float[Array, "B T D"]:
        if self.positions is None:
            return x
        length = x.shape[1]
        self._check_length(length)
        table = constrain(self.positions[...].astype(x.dtype), None, None)
        # positions beyond the table are padding: their embedding reaches no real position
        index = jnp.reshape(offset, (-1, 1)) + jnp.arange(length)[None]
        rows = jnp.take(table, index, axis=0, mode="clip")
        return x + jnp.broadcast_to(rows, x.shape)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_length_causal_mask
        if self.positions is not None and length > limit + PADDING:
            raise ValueError(
                f"{length} frames exceed the {limit} learnt positions of the speech decoder "
                "(model.speech_decoder.max_length_causal_mask); use shorter sequences"
            )


def _where_real(
    is_real: Bool[Array, "B 1"], new: Float[Array, "L B C D"], old: Float[Array, "L B C D"]
) -> Float[Array, "L B C D"]:
    return jnp.where(is_real[None, :, :, None], new, old)


def _attention_inputs(
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None,
    memory: Float[Array, "B S M"] | None,
    memory_mask: Bool[Array, "B S"] | None,
    cache: KVCache | None = None,
) -> SpeechAttentionInputs:
    is_real = jnp.ones(x.shape[:2], bool) if mask is None else mask
    if memory is not None and memory_mask is None:
        memory_mask = jnp.ones(memory.shape[:2], bool)
    return SpeechAttentionInputs(
        is_real=is_real,
        attention_mask=is_real if cache is None else cache.key_mask,
        offset=None if cache is None else cache.used,
        memory=memory,
        memory_mask=memory_mask,
    )
