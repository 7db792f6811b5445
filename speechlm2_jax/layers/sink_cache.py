"""KV cache of a sequence without end: its first tokens, and a ring of its last ones.

Attention to the last tokens alone fails once the first ones are gone: trained models put much of
their attention on these (attention sinks; Xiao et al. 2024, StreamingLLM). So the first tokens
stay. Their keys are kept without rotary positions and placed just before the ring's tokens, at
every step. Distances then never exceed the cache's capacity. Until the cache is full nothing
differs from a cache of all tokens.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.quantized import like
from speechlm2_jax.layers.window_cache import NewTokens, constrained_heads
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SinkCache(KVCache):
    """Takes one token at a time, without limit. `used` [B] counts also the overwritten tokens.

    The first `sinks` cache positions hold the first tokens, the others are the ring. Sequences go
    on at their own pace: one whose new token is padding stays as it is.
    """

    sink_keys: Float[Array, "L B N_kv n H"] | None
    """Keys of the first tokens without rotary positions; None where keys have no positions."""
    is_real: Bool[Array, " B"]
    """False where the new token is padding, from `reserve` to `advance`."""
    sinks: int = field(metadata={"static": True})

    @classmethod
    def around(cls, cache: KVCache, sinks: int, *, has_positions: bool) -> "SinkCache":
        """Makes an empty cache of an empty `KVCache`, whose capacity includes the sinks.

        Raises ValueError unless the ring has at least one position.
        """
        if not 0 < sinks < cache.key_mask.shape[1]:
            raise ValueError(
                f"{sinks} sinks must be at least 1 and leave room in {cache.key_mask.shape[1]} "
                "positions"
            )
        layers, batch, heads, _, width = cache.keys.shape
        zeros = jnp.zeros((layers, batch, heads, sinks, width), cache.dtype)
        return cls(
            **vars(replace(cache, used=jnp.zeros(batch, jnp.int32))),
            sink_keys=constrained_heads(zeros) if has_positions else None,
            is_real=jnp.ones(batch, bool),
            sinks=sinks,
        )

    @property
    def next_position(self) -> Int[Array, " B"]:
        """Cache position of the next token."""
        ring = self.key_mask.shape[1] - self.sinks
        after = self.sinks + (self.used - self.sinks) % ring
        return jnp.where(self.used < self.sinks, self.used, after)

    @property
    def sink_positions(self) -> Int[Array, "B n"]:
        """Positions of the sinks for the next token: those before the ring's oldest token."""
        passed = jnp.maximum(self.used - self.key_mask.shape[1] + 1, 0)
        return passed[:, None] + jnp.arange(self.sinks, dtype=jnp.int32)[None]

    def reserve(
        self, key_mask: Bool[Array, "B T"], token_positions: Int[Array, "B T"] | None = None
    ) -> "SinkCache":
        """Sets the key mask of the next token. Raises ValueError for more than one token."""
        if key_mask.shape[1] != 1:
            raise ValueError(f"a cache with sinks takes 1 token at a time, not {key_mask.shape[1]}")
        cache = replace(self, is_real=key_mask[:, 0])
        marked = self.key_mask.at[cache._sequences, cache._target].set(True, mode="drop")
        return replace(cache, key_mask=marked)

    def write(
        self,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B 1 N_kv H"],
        values: Float[Array, "B 1 N_kv H"],
    ) -> "SinkCache":
        """Writes a layer's keys and values of the next token."""

        def with_new(cached: Array, new: Array) -> Array:
            at = cached.at[layer, self._sequences, :, self._target]
            return at.set(new[:, 0], mode="drop")

        return self._written(with_new, keys, values)

    def advance(self, tokens: int, new: NewTokens | None = None) -> "SinkCache":
        """Counts the next token, where it is real."""
        assert tokens == 1
        return replace(
            self,
            used=self.used + self.is_real,
            is_real=jnp.ones_like(self.is_real),
            windows=self._advanced(new),
        )

    def keep_sink(
        self, layer: Int[Array, ""] | int, keys: Float[Array, "B 1 N_kv H"]
    ) -> "SinkCache":
        """Keeps the key of the next token, without rotary positions, if it is a sink."""
        assert self.sink_keys is not None
        target = jnp.where(self.is_real, self.used, self.sinks)  # beyond the sinks: dropped
        at = self.sink_keys.at[layer, self._sequences, :, target]
        return replace(self, sink_keys=at.set(keys[:, 0], mode="drop"))

    def sinks_of(self, layer: Int[Array, ""] | int) -> Float[Array, "B n N_kv H"]:
        """The keys of a layer's sinks, without rotary positions."""
        assert self.sink_keys is not None
        of_layer = jax.lax.dynamic_index_in_dim(self.sink_keys, layer, keepdims=False)
        return of_layer.swapaxes(1, 2)

    def place_sinks(
        self, layer: Int[Array, ""] | int, keys: Float[Array, "B n N_kv H"]
    ) -> "SinkCache":
        """Writes a layer's sinks with the rotary positions of `sink_positions`."""
        start = (layer, 0, 0, 0, 0)

        def with_sinks(cached: Array, new: Array) -> Array:
            new = new.swapaxes(1, 2)[None]
            old = jax.lax.dynamic_slice(cached, start, new.shape)
            kept = jnp.where(self.is_real[None, :, None, None, None], new, old)
            return jax.lax.dynamic_update_slice(cached, kept, start)

        return replace(self, keys=jax.tree.map(with_sinks, self.keys, like(keys, self.keys)))

    @property
    def _sequences(self) -> Int[Array, " B"]:
        return jnp.arange(len(self.used))

    @property
    def _target(self) -> Int[Array, " B"]:
        """Where the new token is written: its cache position, or beyond the cache for padding."""
        return jnp.where(self.is_real, self.next_position, self.key_mask.shape[1])
