"""The decoder-only LLM: embeddings in, hidden states and logits out, with or without a KV cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask
from speechlm2_jax.layers.cache import CachedOutput, KVCache
from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.feed_forward import GatedFeedForward
from speechlm2_jax.layers.linear import Embedding, Linear, gathered, matmul
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.norms import RMSNorm
from speechlm2_jax.layers.rope import rotation
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.llm.attention import Attention, AttentionInputs
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.sharding import constrain, time_order


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        self.attention_norm = RMSNorm(config.width, rngs=rngs, eps=config.norm_eps)
        self.attention = Attention(config, rngs=rngs, lora=lora)
        self.mlp_norm = RMSNorm(config.width, rngs=rngs, eps=config.norm_eps)
        self.mlp = GatedFeedForward(
            config.width,
            config.mlp_width,
            rngs=rngs,
            activation=config.activation,
            bias=config.mlp_bias,
            init=jax.nn.initializers.normal(config.init_std),
            lora=lora,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Runs one layer. Returns its output, and the cache with its keys and values (or None)."""
        attended, cache = self.attention(
            self.attention_norm(x), inputs, rngs=fold_rngs(rngs, 0), cache=cache, layer=layer
        )
        x = x + attended
        x = x + self.mlp(self.mlp_norm(x), fold_rngs(rngs, 1))
        return constrain(x, "batch", "time", "act_embed"), cache


class Decoder(nnx.Module):
    """A decoder-only language model; the config chooses the family (Llama, Qwen2, Qwen3)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        init = jax.nn.initializers.normal(config.init_std)
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, rngs=rngs, init=init)
        self.layers = stack(
            lambda layer_rngs: Block(config, rngs=layer_rngs, lora=lora), config.layers, rngs
        )
        self.norm = RMSNorm(config.width, rngs=rngs, eps=config.norm_eps)
        self.head = None if config.tied else _head(config, rngs)

    def embed(self, ids: Int[Array, "B *inner T"]) -> Float[Array, "B *inner T D"]:
        """Looks up token embeddings, in the dtype of the table."""
        inner = (None,) * (ids.ndim - 2)
        embeds = constrain(self.embedding(ids), "batch", *inner, "tokens", "act_embed")
        return constrain(embeds, "batch", *inner, "time", "act_embed")

    def __call__(
        self,
        embeds: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        rngs: Key[Array, " B"] | None = None,
        remat: RematPolicy = "full",
    ) -> Float[Array, "B T D"]:
        """Computes the hidden states after the final norm, in the dtype of `embeds`.

        Position i attends to position j if j <= i, both have the same segment id, and
        `attention_mask[j]` is True. The output of a position that attends to nothing is finite and
        meaningless. With `rngs`, one per sequence, LoRA dropout is on. `remat` chooses what the
        backward pass recomputes (see `scan_layers`). On a mesh with a context axis the tokens are
        in the order of `Sharding.time_order`; `put_batch` brings them there.
        """
        inputs = self._attention_inputs(
            positions,
            segments,
            jnp.where(attention_mask, segments, MASKED_KEY),
            ring_order=time_order(embeds.shape[1]),
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
        key_segments = jnp.where(attention_mask, segments, MASKED_KEY)
        inputs = self._attention_inputs(positions, segments, key_segments)
        return self._run(embeds, inputs, emit=lambda x: x)[2]

    def new_cache(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        """Makes an empty KV cache of `capacity` positions for `batch` sequences."""
        c = self.config
        return KVCache.empty((c.layers, batch, capacity, c.kv_heads, c.head_width), dtype)

    def extend(
        self,
        embeds: Float[Array, "B T D"],
        cache: KVCache,
        *,
        positions: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
    ) -> CachedOutput:
        """Runs T further tokens of each sequence in `cache`; one segment per sequence.

        The cache must have T free positions. The hidden states equal those of `__call__` on the
        whole sequence.
        """
        cache = cache.reserve(attention_mask)
        query_segments = jnp.zeros(attention_mask.shape, jnp.int32)
        key_segments = jnp.where(cache.key_mask, 0, MASKED_KEY)
        inputs = self._attention_inputs(positions, query_segments, key_segments, cache.used)
        x, written, _ = self._run(embeds, inputs, cache=cache)
        return CachedOutput(self.norm(x), written.advance(attention_mask.shape[1]))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes the logits of every token, in fp32 whatever the dtype of `hidden`."""
        weight = gathered((self.embedding if self.head is None else self.head).weight, hidden.dtype)
        logits = matmul(hidden, weight, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "tokens", "act_vocab")

    def _attention_inputs(
        self,
        positions: Int[Array, "B T"],
        query_segments: Int[Array, "B T"],
        key_segments: Int[Array, "B S"],
        offset: Int[Array, ""] | None = None,
        ring_order: np.ndarray | None = None,
    ) -> AttentionInputs:
        return AttentionInputs(
            rotation=rotation(self.config.rope, positions, self.config.head_width),
            mask=AttentionMask(
                query_segments=query_segments,
                key_segments=key_segments,
                offset=offset,
                ring_order=ring_order,
            ),
        )

    def _run(
        self,
        embeds: Float[Array, "B T D"],
        inputs: AttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        remat: RematPolicy = "none",
        emit: Callable[[Array], Any] = lambda x: None,
    ) -> tuple[Array, Any, Any]:
        # The cache is carried, not scanned over: each layer then updates its part in place.
        def body(block: Block, carry: Any, layer: Array) -> tuple[Any, Any]:
            x, cache = carry
            x, cache = block(x, inputs, rngs=fold_rngs(rngs, layer), cache=cache, layer=layer)
            return (x, cache), emit(x)

        x = constrain(embeds, "batch", "time", "act_embed")
        layers = jnp.arange(self.config.layers)
        (x, cache), emitted = scan_layers(self.layers, body, (x, cache), layers, remat=remat)
        return x, cache, emitted


def _head(config: DecoderConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(
        config.width,
        config.vocab_size,
        axes=("vocab", "embed"),
        rngs=rngs,
        bias=False,
        init=jax.nn.initializers.normal(config.init_std),
    )
