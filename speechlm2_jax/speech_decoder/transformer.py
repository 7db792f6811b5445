"""The transformer inside the speech decoder (NeMo's transformer_2501): pre-norm, convolutional."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.dropout import dropout, fold_rngs
from speechlm2_jax.layers.module import param
from speechlm2_jax.layers.norms import LayerNorm
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.sharding import constrain
from speechlm2_jax.speech_decoder.attention import (
    CrossAttention,
    JointSelfAttention,
    SpeechAttentionInputs,
    default_init,
)
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.feed_forward import ConvFeedForward, Tails

PADDING = 64
"""Steps that a batch may have beyond the last position: what is real is counted before."""
_INPUT_PLACE, _LAYERS_PLACE, _OUTPUT_PLACE = range(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TransformerState:
    """What the layers remember of the steps before; arrays of fixed sizes."""

    cache: KVCache
    tails: Tails
    """[L, B, k - 1, ...]."""


class TransformerOutput(NamedTuple):
    """What the transformer gives for further steps, and what it then remembers."""

    hidden: Float[Array, "B T D"]
    state: TransformerState


class Layer(nnx.Module):
    """x + attention(norm(x)), then the memory likewise, then the feed-forward."""

    def __init__(self, config: SpeechDecoderConfig, *, rngs: nnx.Rngs):
        def norm(width: int) -> LayerNorm:
            return LayerNorm(width, rngs=rngs, bias=False)

        has_memory = config.has_xattn
        self.attention_norm = norm(config.d_model)
        self.attention = JointSelfAttention(config, rngs=rngs)
        self.cross_norm = norm(config.d_model) if has_memory else None
        self.cross_attention = CrossAttention(config, rngs=rngs) if has_memory else None
        is_normed = has_memory and config.apply_norm_to_cond
        self.memory_norm = norm(config.memory_width) if is_normed else None
        self.feed_forward_norm = norm(config.d_model)
        self.feed_forward = ConvFeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        place: SpeechAttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        tails: Tails | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Tails | None]:
        """Runs one layer; what is padding comes out as zeros."""
        added, cache = self.attention(
            self.attention_norm(x), place, rngs=fold_rngs(rngs, 0), cache=cache, layer=layer
        )
        x = x + added
        if place.memory is not None and self.cross_attention and self.cross_norm:
            memory = place.memory if self.memory_norm is None else self.memory_norm(place.memory)
            x = x + self.cross_attention(
                self.cross_norm(x), memory, place.is_memory, fold_rngs(rngs, 1)
            )
        added, tails = self.feed_forward(
            self.feed_forward_norm(x), place.is_real, rngs=fold_rngs(rngs, 2), tails=tails
        )
        x = jnp.where(place.is_real[..., None], x + added, jnp.zeros((), x.dtype))
        return constrain(x, "batch", "time", "act_embed"), cache, tails


class Transformer(nnx.Module):
    """A stack of layers over [B, T, D]: causal or not, with or without a memory."""

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
        """Transforms rows, in the dtype of `x`; the masks are True where a step is no padding.

        What is padding comes out as zeros and has no influence. `rngs`, one per row, switch
        dropout on; `remat` says what of a layer the backward pass computes again. Raises
        ValueError for more steps than there are positions, padding of a batch aside.
        """
        place = _place(x, mask, memory, memory_mask)
        x, _, _ = self._run(x, place, rngs=rngs, remat=remat)
        return self._finish(x, rngs)

    def layer_outputs(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        memory: Float[Array, "B S M"] | None = None,
        memory_mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "L B T D"]:
        """Computes the residual stream after each layer, before the final norm."""
        place = _place(x, mask, memory, memory_mask)
        return self._run(x, place, emit=lambda x: x)[2][0]

    def new_state(self, batch: int, capacity: int, dtype: Any) -> TransformerState:
        """Makes what `extend` carries: room for `capacity` steps of `batch` rows.

        Raises ValueError if the layers look ahead, or have fewer positions than that, padding of a
        batch aside.
        """
        c = self.config
        if not c.is_causal:
            raise ValueError("steps one by one need is_causal: true")
        self._check_length(capacity)
        heads = (c.sa_n_heads, c.d_model // c.sa_n_heads)

        def tail(width: int) -> Array:
            zeros = jnp.zeros((c.n_layers, batch, c.kernel_size - 1, width), dtype)
            return constrain(zeros, None, "batch", None, None)

        return TransformerState(
            cache=KVCache.empty((c.n_layers, batch, capacity, *heads), dtype),
            tails=Tails(hidden=tail(c.d_model), output=tail(c.d_ffn)),
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
        """Runs T further steps of every row: equal, step by step, to `__call__` on the whole.

        The state must have T free slots, which the caller counts. The memory is projected anew.
        """
        is_real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        cache = state.cache.announce(is_real)
        place = _place(x, is_real, memory, memory_mask, cache)
        x, cache, (_, tails) = self._run(x, place, cache=cache, tails=state.tails)
        state = TransformerState(cache=cache.advance(x.shape[1]), tails=tails)
        return TransformerOutput(self._finish(x, None), state)

    def _run(
        self,
        x: Float[Array, "B T D"],
        place: SpeechAttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        tails: Tails | None = None,
        remat: RematPolicy = "none",
        emit: Callable[[Array], Any] = lambda x: None,
    ) -> tuple[Array, Any, Any]:
        x = self._with_positions(x, 0 if place.offset is None else place.offset)
        x = dropout(x, self.config.p_dropout, fold_rngs(rngs, _INPUT_PLACE))
        # a selection, not a product: not even a NaN in the padding passes
        x = jnp.where(place.is_real[..., None], x, jnp.zeros((), x.dtype))
        layer_rngs = fold_rngs(rngs, _LAYERS_PLACE)

        # The cache is carried, not scanned over: each layer then writes its slot in place.
        def body(layer: Layer, carry: Any, inputs: Any) -> tuple[Any, Any]:
            (x, cache), (index, tails) = carry, inputs
            x, cache, tails = layer(
                x,
                place,
                rngs=fold_rngs(layer_rngs, index),
                cache=cache,
                tails=tails,
                layer=index,
            )
            return (x, cache), (emit(x), tails)

        x = constrain(x, "batch", "time", "act_embed")
        xs = (jnp.arange(self.config.n_layers), tails)
        (x, cache), emitted = scan_layers(self.layers, body, (x, cache), xs, remat=remat)
        return x, cache, emitted

    def _finish(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None
    ) -> Float[Array, "B T D"]:
        x = x if self.norm is None else self.norm(x)
        return dropout(x, self.config.p_dropout_out, fold_rngs(rngs, _OUTPUT_PLACE))

    def _with_positions(
        self, x: Float[Array, "B T D"], offset: Int[Array, ""] | int
    ) -> Float[Array, "B T D"]:
        if self.positions is None:
            return x
        steps = x.shape[1]
        self._check_length(steps)
        table = constrain(self.positions[...].astype(x.dtype), None, None)
        # steps beyond the table are padding of a batch: what they get reaches no real one
        rows = jnp.take(table, offset + jnp.arange(steps), axis=0, mode="clip")
        return x + jnp.broadcast_to(rows, x.shape)

    def _check_length(self, steps: int) -> None:
        limit = self.config.max_length_causal_mask
        if self.positions is not None and steps > limit + PADDING:
            raise ValueError(
                f"{steps} steps exceed the {limit} learnt positions of the speech decoder; "
                "make rows shorter (model.speech_decoder.max_length_causal_mask is the limit)"
            )


def _place(
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
        is_memory=memory_mask,
    )
