"""Grouped-query self-attention with rotary positions."""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.attention import AttentionMask, attend
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.lora import LoraConfig, LoraLinear
from speechlm2_jax.layers.norms import RMSNorm
from speechlm2_jax.layers.rope import Rotation, rotate
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Rotary angles and attention mask of one forward pass; the same for all layers."""

    rotation: Rotation
    mask: AttentionMask


class Attention(nnx.Module):
    """Query, key, value and output projections around `attend`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        init = jax.nn.initializers.normal(config.init_std)
        queries = config.heads * config.head_width
        keys = config.kv_heads * config.head_width

        def linear(
            name: str, d_in: int, d_out: int, axes: tuple[str, str], bias: bool
        ) -> LoraLinear:
            adapter = lora if lora is not None and name in lora.targets else None
            return LoraLinear(d_in, d_out, axes=axes, rngs=rngs, bias=bias, init=init, lora=adapter)

        D, bias = config.width, config.attention_bias
        self.head_width = config.head_width
        self.query = linear("query", D, queries, ("heads", "embed"), bias)
        self.key = linear("key", D, keys, ("kv_heads", "embed"), bias)
        self.value = linear("value", D, keys, ("kv_heads", "embed"), bias)
        self.output = linear("output", queries, D, ("embed", "heads"), config.output_bias)
        self.query_norm = self._head_norm(config, rngs)
        self.key_norm = self._head_norm(config, rngs)

    @staticmethod
    def _head_norm(config: DecoderConfig, rngs: nnx.Rngs) -> RMSNorm | None:
        if not config.qk_norm:
            return None
        return RMSNorm(config.head_width, rngs=rngs, eps=config.norm_eps)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        *,
        rngs: Key[Array, " B"] | None = None,
        cache: KVCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends to the positions of `x`; with a cache, to all cached positions of this layer.

        Returns the output and the cache, to which the keys and values of `x` were added.
        """
        x = constrain(x, "batch", "tokens", "act_embed")
        q = self._heads(self.query(x, fold_rngs(rngs, 0)))
        k = self._heads(self.key(x, fold_rngs(rngs, 1)))
        v = self._heads(self.value(x, fold_rngs(rngs, 2)))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, inputs.rotation), rotate(k, inputs.rotation)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.read(layer)
        heads = attend(q, k, v, mask=inputs.mask, scale=self.head_width**-0.5)
        heads = constrain(heads, "batch", "tokens", "act_heads", None)
        out = self.output(heads.reshape(*x.shape[:2], -1), fold_rngs(rngs, 3))  # [B, T, D]
        # first sum over the tensor-parallel devices, then shard the result along time
        out = constrain(out, "batch", "tokens", "act_embed")
        return constrain(out, "batch", "time", "act_embed"), cache

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        heads = x.reshape(*x.shape[:2], -1, self.head_width)  # [B, T, N, H]
        return constrain(heads, "batch", "tokens", "act_heads", None)
