"""The decoder-only LLM: embeddings in, hidden states and logits out, with or without a KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask
from speechlm2_jax.layers.cache import KVCache, RingCache
from speechlm2_jax.layers.decoding_cache import CachedOutput, DecodingCache
from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import Embedding, Linear, project, zeros
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import param
from speechlm2_jax.layers.norms import LayerNorm, RMSNorm
from speechlm2_jax.layers.paged_cache import PagedCache
from speechlm2_jax.layers.rope import RopeConfig, Rotation, rotation
from speechlm2_jax.layers.scores import capped
from speechlm2_jax.layers.sink_cache import SinkCache
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.layers.window_cache import NOTHING, NewTokens
from speechlm2_jax.llm import caches
from speechlm2_jax.llm.attention import Attention, AttentionInputs
from speechlm2_jax.llm.config import DecoderConfig, LayerKind
from speechlm2_jax.llm.feed_forward import LlmFeedForward
from speechlm2_jax.llm.norms import make_norm
from speechlm2_jax.sharding import constrain, time_order

Carry = tuple[Array, DecodingCache | None]
"""The residual stream and the cache."""


class Block(nnx.Module):
    """One layer: attention and feed-forward, each added to the residual stream.

    `DecoderConfig.block` places the norms.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        def norm(is_there: bool) -> LayerNorm | RMSNorm | None:
            return make_norm(config, config.width, rngs) if is_there else None

        has_norms_before, has_norms_after = config.block != "post", config.block != "pre"
        is_parallel = config.block == "parallel"
        self.config = config
        self.attention_norm = norm(has_norms_before)
        self.attention = Attention(config, rngs=rngs, lora=lora)
        self.attention_post_norm = norm(has_norms_after and not is_parallel)
        self.mlp_norm = norm(has_norms_before and not is_parallel)
        self.mlp = LlmFeedForward(config, rngs=rngs, lora=lora)
        self.mlp_post_norm = norm(has_norms_after and not is_parallel)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        kind: LayerKind,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: DecodingCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], DecodingCache | None]:
        """Runs one layer. Returns its output, and the cache with its keys and values (or None)."""
        normed = _normed(x, self.attention_norm)
        attended, cache = self.attention(
            normed, inputs, kind, rngs=fold_rngs(rngs, 0), cache=cache, layer=layer
        )
        attended = self._scaled(_normed(attended, self.attention_post_norm))
        if self.config.block == "parallel":
            fed = self._scaled(self.mlp(normed, fold_rngs(rngs, 1)))
            return constrain(x + attended + fed, "batch", "time", "act_embed"), cache
        x = x + attended
        fed = self.mlp(_normed(x, self.mlp_norm), fold_rngs(rngs, 1))
        x = x + self._scaled(_normed(fed, self.mlp_post_norm))
        return constrain(x, "batch", "time", "act_embed"), cache

    def _scaled(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if self.config.residual_scale == 1.0 else x * self.config.residual_scale


if TYPE_CHECKING:
    Blocks = Block | nnx.List[Block]
    """Stacks of blocks, or one layer of each: one, or one per element of the pattern."""
else:
    Blocks = nnx.Module  # the checks at run time cannot read nnx.List


class Decoder(nnx.Module):
    """A decoder-only language model; the config chooses the family.

    The variables of the layers are stacked: one stack if all layers are of one kind, else one stack
    per element of the pattern. `remainder` holds the layers after the last whole pattern.
    `kv_cache_kind` is None, or "int8" or "fp8" for a quantized KV cache.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        def make(layer_rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=layer_rngs, lora=lora)

        def stacks(places: int, repeats: int) -> Blocks:
            if len(config.pattern) == 1:
                return stack(make, repeats, rngs)
            return nnx.List([stack(make, repeats, rngs) for _ in range(places)])

        init = jax.nn.initializers.normal(config.init_std)
        self.config = config
        self.kv_cache_kind: str | None = None
        self.embedding = Embedding(config.vocab_size, config.width, rngs=rngs, init=init)
        self.layers = stacks(len(config.pattern), config.repeats) if config.repeats else None
        self.remainder = stacks(config.remainder, 1) if config.remainder else None
        self.norm = make_norm(config, config.width, rngs)
        self.head = None if config.tied else _head(config, rngs)
        has_own_bias = config.tied and config.head_bias
        self.head_bias = _head_bias(config, rngs) if has_own_bias else None

    def embed(self, ids: Int[Array, "B *inner T"]) -> Float[Array, "B *inner T D"]:
        """Looks up token embeddings, in the dtype of the table; fp32 from a quantized one."""
        inner = (None,) * (ids.ndim - 2)
        embeds = constrain(self.embedding(ids), "batch", *inner, "tokens", "act_embed")
        if not self.config.scales_all_inputs:
            embeds = self._scaled(embeds)
        return constrain(embeds, "batch", *inner, "time", "act_embed")

    def __call__(
        self,
        embeds: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        unpacked: bool = False,
        longest: int | None = None,
        rngs: Key[Array, " B"] | None = None,
        remat: RematPolicy = "full",
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states after the final norm, in the dtype of `embeds`.

        Position i attends to position j if j <= i, both have the same segment id, the layer's
        window and chunk hold both, and `attention_mask[j]` is True. The output of a position that
        attends to nothing is finite and meaningless. `unpacked` promises that each row is one
        segment from its first token, and padding after it: fused attention on GPUs needs it.
        `longest` promises that no segment has more tokens: attention skips the others. With
        `rngs`, one per sequence, LoRA dropout is on. `remat` chooses what the backward pass
        recomputes (see `scan_layers`). On a mesh with a context axis the tokens are in the order of
        `Sharding.time_order`; `put_batch` brings them there.
        """
        inputs = self._attention_inputs(
            positions,
            segments,
            jnp.where(attention_mask, segments, MASKED_KEY),
            ring_order=time_order(embeds.shape[1]),
            unpacked=unpacked,
            longest=longest,
        )
        x, _, _ = self._run(embeds, inputs, rngs=rngs, remat=remat)
        return self.norm(x)

    def layer_outputs(
        self,
        embeds: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
    ) -> Float[Array, "L B T D"]:
        """Computes the residual stream after each layer, before the final norm."""
        keys = jnp.where(attention_mask, segments, MASKED_KEY)
        inputs = self._attention_inputs(positions, segments, keys)
        return jnp.concatenate(self._run(embeds, inputs, emit=lambda x: x)[2])

    def new_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """Makes an empty KV cache of `capacity` positions for `batch` sequences."""
        return caches.new_cache(self.config, (batch, capacity), dtype, self.kv_cache_kind)

    def sink_cache(self, batch: int, capacity: int, dtype: DTypeLike, sinks: int) -> SinkCache:
        """Makes an empty cache for sequences without end; `capacity` includes the sinks."""
        room = (batch, capacity)
        return caches.sink_cache(self.config, room, dtype, self.kv_cache_kind, sinks)

    def slot_cache(
        self, slots: int, prompt_tokens: int, new_tokens: int, dtype: DTypeLike
    ) -> RingCache | PagedCache:
        """Makes an empty cache for continuous batching, of pages where a kernel reads those."""
        room = (slots, prompt_tokens, new_tokens)
        return caches.slot_cache(self.config, room, dtype, self.kv_cache_kind)

    def extend(
        self,
        embeds: Float[Array, "B T D"],
        cache: DecodingCache,
        *,
        positions: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        is_first: bool = False,
        unpacked: bool = False,
    ) -> CachedOutput:
        """Runs T further tokens of each sequence in `cache`; one segment per sequence.

        The cache must have T free positions. The hidden states equal those of `__call__` on the
        whole sequence. `is_first`: the cache is empty, so the tokens attend to each other only, and
        nothing is read from it. `unpacked` as for `__call__`.
        """
        cache = cache.reserve(attention_mask, positions)
        new = NewTokens(positions, attention_mask)
        if is_first:
            segments = jnp.zeros(positions.shape, jnp.int32)
            keys = jnp.where(attention_mask, segments, MASKED_KEY)
            inputs = self._attention_inputs(positions, segments, keys, unpacked=unpacked)
            inputs = replace(inputs, reads_cache=False)
        else:
            inputs = self._cached_inputs(cache, new)
        x, written, _ = self._run(embeds, inputs, cache=cache)
        return CachedOutput(self.norm(x), written.advance(attention_mask.shape[1], new))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes the logits of every token, in fp32 whatever the dtype of `hidden`."""
        out = self.embedding if self.head is None else self.head
        fp32 = jnp.float32
        logits = project(hidden, out.weight, out.weight_scale, preferred_element_type=fp32)
        bias = self.head_bias if self.head is None else self.head.bias
        if bias is not None:
            logits += bias[...].astype(jnp.float32)[None, None]
        if self.config.logit_scale != 1.0:
            logits *= self.config.logit_scale
        logits = capped(logits, self.config.logit_softcap)
        return constrain(logits, "batch", "tokens", "act_vocab")

    def _scaled(self, embeds: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        scale = self.config.embedding_scale
        return embeds if scale == 1.0 else embeds * jnp.asarray(scale, embeds.dtype)

    def _attention_inputs(
        self,
        positions: Int[Array, "B T"],
        query_segments: Int[Array, "B T"],
        key_segments: Int[Array, "B T"],
        ring_order: np.ndarray | None = None,
        *,
        unpacked: bool = False,
        longest: int | None = None,
    ) -> AttentionInputs:
        """Rotary angles and masks for tokens that attend to each other."""

        def mask(kind: LayerKind) -> AttentionMask:
            is_narrow = kind.window is not None or kind.chunk is not None
            return AttentionMask(
                query_segments=query_segments,
                key_segments=key_segments,
                ring_order=ring_order,
                unpacked=unpacked,
                longest=longest,
                window=kind.window,
                chunk=kind.chunk,
                query_positions=positions if is_narrow else None,
                key_positions=positions if is_narrow else None,
            )

        masks = {kind: mask(kind) for kind in self.config.pattern}
        return self._with_rotations(NewTokens(positions, key_segments != MASKED_KEY), masks)

    def _cached_inputs(self, cache: DecodingCache, new: NewTokens) -> AttentionInputs:
        """Rotary angles and masks for new tokens that attend to a cache."""
        queries = jnp.zeros(new.positions.shape, jnp.int32)

        def mask(kind: LayerKind) -> AttentionMask:
            if kind.window is None:
                return AttentionMask(
                    query_segments=queries,
                    key_segments=jnp.where(cache.key_mask, 0, MASKED_KEY),
                    offset=cache.used,
                    chunk=kind.chunk,
                    query_positions=new.positions if kind.chunk else None,
                    key_positions=cache.token_positions if kind.chunk else None,
                )
            seen = cache.window_of(kind.window).seen(new)
            return AttentionMask(
                query_segments=queries,
                key_segments=jnp.where(seen == NOTHING, MASKED_KEY, 0),
                window=kind.window,
                query_positions=new.positions,
                key_positions=seen,
                by_position=True,
            )

        masks = {kind: mask(kind) for kind in self.config.pattern}
        inputs = self._with_rotations(new, masks)
        if not isinstance(cache, SinkCache):
            return inputs
        sinks = cache.sink_positions
        return replace(inputs, sink_rotations=self._rotations(NewTokens(sinks, sinks >= 0)))

    def _with_rotations(
        self, tokens: NewTokens, masks: dict[LayerKind, AttentionMask]
    ) -> AttentionInputs:
        return AttentionInputs(
            rotations=self._rotations(tokens),
            masks=masks,
            tokens=tokens,
            query_scale=self._query_scale(tokens.positions),
        )

    def _rotations(self, tokens: NewTokens) -> dict[RopeConfig, Rotation]:
        c = self.config
        ropes = [rope for kind in c.pattern if (rope := c.rope_of(kind)) is not None]
        return {
            rope: rotation(rope, tokens.positions, c.head_width, tokens.is_real)
            for rope in dict.fromkeys(ropes)
        }

    def _query_scale(self, positions: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        c = self.config
        if not c.query_growth:
            return None
        periods = (positions // c.query_growth_positions).astype(jnp.float32)
        return 1.0 + c.query_growth * jnp.log1p(periods)

    def _run(
        self,
        embeds: Float[Array, "B T D"],
        inputs: AttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: DecodingCache | None = None,
        remat: RematPolicy = "none",
        emit: Callable[[Array], PyTree] = lambda x: None,
    ) -> tuple[Array, Any, list[Any]]:
        """Runs all layers. Returns the output, the cache, and the stacked values of `emit`."""
        pattern = self.config.pattern

        # The cache is carried, not scanned over: each layer then updates its part in place.
        def body(blocks: Blocks, carry: Carry, layer: Array) -> tuple[Carry, list[PyTree]]:
            x, cache = carry
            emitted = []
            for place, block in enumerate(_in_pattern(blocks)):
                rank, count = self.config.rank(place)
                x, cache = block(
                    x,
                    inputs,
                    pattern[place],
                    rngs=fold_rngs(rngs, layer + place if place else layer),
                    cache=cache,
                    layer=layer if len(pattern) == 1 else layer // len(pattern) * count + rank,
                )
                emitted.append(emit(x))
            return (x, cache), emitted

        x = self._scaled(embeds) if self.config.scales_all_inputs else embeds
        carry = (constrain(x, "batch", "time", "act_embed"), cache)
        first, end = 0, self.config.repeats * len(pattern)
        outputs = []
        for layers in (self.layers, self.remainder):
            if layers is not None:
                numbers = jnp.arange(first, end, len(pattern))
                carry, emitted = scan_layers(layers, body, carry, numbers, remat=remat)
                outputs.append(_in_order(emitted))
            first, end = end, self.config.layers
        x, cache = carry
        return x, cache, outputs


def _in_pattern(blocks: Blocks) -> Sequence[Block]:
    return list(blocks) if isinstance(blocks, nnx.List) else [blocks]


def _in_order(emitted: list[PyTree]) -> PyTree:
    """[R, ...] per element of the pattern -> [R * elements, ...], in the order of the layers."""
    if len(emitted) == 1:
        return emitted[0]
    return jax.tree.map(
        lambda *each: jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:]), *emitted
    )


def _normed(x: Float[Array, "B T D"], norm: LayerNorm | RMSNorm | None) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


def _head_bias(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Param:
    return param(rngs, (config.vocab_size,), ("vocab",), zeros)


def _head(config: DecoderConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(
        config.width,
        config.vocab_size,
        axes=("vocab", "embed"),
        rngs=rngs,
        bias=config.head_bias,
        init=jax.nn.initializers.normal(config.init_std),
    )
