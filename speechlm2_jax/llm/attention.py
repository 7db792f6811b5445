"""Grouped-query self-attention with rotary positions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.attention import AttentionMask, attend
from speechlm2_jax.layers.decoding_cache import DecodingCache
from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import send_rows
from speechlm2_jax.layers.lora import LoraConfig, LoraLinear
from speechlm2_jax.layers.norms import LayerNorm, RMSNorm
from speechlm2_jax.layers.rope import RopeConfig, Rotation, rotate
from speechlm2_jax.layers.sink_cache import SinkCache
from speechlm2_jax.layers.window_cache import NewTokens
from speechlm2_jax.llm.config import DecoderConfig, LayerKind
from speechlm2_jax.llm.norms import make_norm
from speechlm2_jax.sharding import constrain, key_value_copies


@dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Rotary angles and attention masks of one forward pass, per kind of layer."""

    rotations: Mapping[RopeConfig, Rotation]
    masks: Mapping[LayerKind, AttentionMask]
    tokens: NewTokens
    query_scale: Float[Array, "B T"] | None = None
    """Factor of each query, which depends on its position; None: 1."""
    sink_rotations: Mapping[RopeConfig, Rotation] = field(default_factory=dict)
    """Rotary angles of the first tokens, for a `SinkCache`."""
    reads_cache: bool = True
    """False: the tokens attend to each other; a cache is only written."""


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

        D, bias, fused = config.width, config.attention_bias, config.fused_qkv

        def projection(name: str, d_out: int, axis: str, *, is_there: bool) -> LoraLinear | None:
            return linear(name, D, d_out, (axis, "embed"), bias) if is_there else None

        def norm(width: int) -> LayerNorm | RMSNorm | None:
            return None if config.qk_norm == "none" else make_norm(config, width, rngs)

        self.config = config
        self.qkv = projection("qkv", queries + 2 * keys, "heads", is_there=fused)
        self.query = projection("query", queries, "heads", is_there=not fused)
        self.key = projection("key", keys, "kv_heads", is_there=not fused)
        self.value = projection("value", keys, "kv_heads", is_there=not fused)
        self.output = linear("output", queries, D, ("embed", "heads"), config.output_bias)
        whole = config.qk_norm == "width"
        self.query_norm = norm(queries if whole else config.head_width)
        self.key_norm = norm(keys if whole else config.head_width)

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
        """Attends to the positions of `x`; with a cache, to all cached positions of this layer.

        `layer` is the layer's index in the cache: its number among the layers of one window.
        Returns the output and the cache, to which the keys and values of `x` were added.
        """
        x = constrain(x, "batch", "tokens", "act_embed")
        q, k, v = self._projected(x, rngs)
        rope, unrotated = self.config.rope_of(kind), k
        q = self._rotated(q, rope, inputs.rotations, self.query_norm)
        k = self._rotated(k, rope, inputs.rotations, self.key_norm)
        if inputs.query_scale is not None:
            q = q * inputs.query_scale[:, :, None, None].astype(q.dtype)
        if cache is not None and kind.window is not None:
            window, *seen = cache.window_of(kind.window).update(layer, k, v, inputs.tokens)
            cache = cache.with_window(window)
            k, v = seen if inputs.reads_cache else (k, v)
        elif cache is not None:
            cache = cache.write(layer, k, v)
            if isinstance(cache, SinkCache):
                cache = cache.keep_sink(layer, unrotated)
                sinks = self._rotated(
                    cache.sinks_of(layer), rope, inputs.sink_rotations, self.key_norm
                )
                cache = cache.place_sinks(layer, sinks)
            k, v = cache.read(layer) if inputs.reads_cache else (k, v)
        heads = attend(
            q,
            k,
            v,
            mask=inputs.masks[kind],
            scale=self.config.scale,
            softcap=self.config.attention_softcap,
        )
        heads = constrain(heads, "batch", "tokens", "act_heads", None)
        out = self.output(heads.reshape(*x.shape[:2], -1), fold_rngs(rngs, 3))  # [B, T, D]
        # first sum over the tensor-parallel devices, then shard the result along time
        out = constrain(out, "batch", "tokens", "act_embed")
        return constrain(out, "batch", "time", "act_embed"), cache

    def _projected(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N_kv H"], Float[Array, "B T N_kv H"]]:
        """Computes queries, keys and values, with the norms that come before the rotation."""
        x = send_rows(x, self.qkv, self.query)
        if self.qkv is not None:
            c = self.config
            ends = [c.heads * c.head_width, (c.heads + c.kv_heads) * c.head_width]
            q, k, v = jnp.split(self.qkv(x, fold_rngs(rngs, 0)), ends, axis=-1)
        else:
            assert self.query is not None and self.key is not None and self.value is not None
            q = self.query(x, fold_rngs(rngs, 0))
            k = self.key(x, fold_rngs(rngs, 1))
            v = self.value(x, fold_rngs(rngs, 2))
        if self.config.qk_norm == "width":
            q, k = self._normed(q, k)
        copies = key_value_copies(self.config.kv_heads, self.config.heads)
        q, k, v = self._heads(q), self._heads(k, copies), self._heads(v, copies)
        if self.config.qk_norm == "head":
            q, k = self._normed(q, k)
        return q, k, v

    def _rotated(
        self,
        x: Float[Array, "B T N H"],
        rope: RopeConfig | None,
        rotations: Mapping[RopeConfig, Rotation],
        norm: LayerNorm | RMSNorm | None,
    ) -> Float[Array, "B T N H"]:
        """Rotates queries or keys, with the norm that comes after the rotation."""
        if rope is not None:
            x = rotate(x, rotations[rope], interleaved=rope.interleaved)
        if norm is not None and self.config.qk_norm == "head_after_rope":
            return norm(x)
        return x

    def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        assert self.query_norm is not None and self.key_norm is not None
        return self.query_norm(q), self.key_norm(k)

    def _heads(self, x: Float[Array, "B T NH"], copies: int = 1) -> Float[Array, "B T N H"]:
        heads = x.reshape(*x.shape[:2], -1, self.config.head_width)  # [B, T, N, H]
        heads = jnp.repeat(heads, copies, axis=2) if copies > 1 else heads
        return constrain(heads, "batch", "tokens", "act_heads", None)
