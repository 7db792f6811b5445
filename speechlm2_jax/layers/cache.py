"""KV cache: keys and values of past tokens, in arrays of a fixed capacity."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.quantized import Heads, QuantizedArray, like
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.layers.window_cache import (
    CachedHeads,
    NewTokens,
    WindowCache,
    WithWindows,
    constrained_heads,
    empty_heads,
)
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain

C = TypeVar("C", bound="KVCache")


@register_pytree
@dataclass(frozen=True, kw_only=True)
class KVCache(WithWindows):
    """Keys and values of a batch of sequences, for all layers.

    Layers with a sliding window have caches of their own in `windows`.

    New tokens take the next cache positions in every sequence at once, so positions are in order
    of time; `key_mask` is False at the padding of shorter sequences. Of T new tokens: `reserve`
    marks them, each layer calls `write` and `read`, `advance` counts them.
    """

    keys: CachedHeads
    """[L, B, N_kv, S, H]: one [S, H] matrix per head, as the matmuls of attention read it."""
    values: CachedHeads
    key_mask: Bool[Array, "B S"]
    """True at positions that queries may attend to."""
    used: Int[Array, ""] | Int[Array, " B"]
    """Positions taken so far; the same in every sequence, except in a `DraftCache`."""
    token_positions: Int[Array, "B S"] | None = None
    """Position of each token in its own sequence, for chunked attention; None without it."""

    @property
    def next_position(self) -> Int[Array, ""] | Int[Array, " B"]:
        """Cache position of the next token."""
        return self.used

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations that keys and values were computed in."""
        kept = self.keys.scales if isinstance(self.keys, QuantizedArray) else self.keys
        return jnp.dtype(kept.dtype)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        dtype: DTypeLike,
        *,
        windows: tuple[WindowCache, ...] = (),
        keeps_token_positions: bool = False,
        kind: str | None = None,
    ) -> "KVCache":
        """Makes an empty cache; `shape` is (L, B, S, N_kv, H).

        With `kind`, "int8" or "fp8", each key and value is quantized with a scale of its own.
        """
        layers, batch, capacity, heads, width = shape
        stored = (layers, batch, heads, capacity, width)
        return cls(
            keys=constrained_heads(empty_heads(stored, dtype, kind)),
            values=constrained_heads(empty_heads(stored, dtype, kind)),
            key_mask=jnp.zeros((batch, capacity), bool),
            used=jnp.zeros((), jnp.int32),
            token_positions=(
                jnp.zeros((batch, capacity), jnp.int32) if keeps_token_positions else None
            ),
            windows=windows,
        )

    def reserve(
        self: C, key_mask: Bool[Array, "B T"], token_positions: Int[Array, "B T"] | None = None
    ) -> C:
        """Sets the key mask, and the tokens' own positions if they are kept, of the next T.

        Raises ValueError if T exceeds the capacity. How many positions are free is known only at
        run time: the caller must count them.
        """
        if key_mask.shape[1] > self.key_mask.shape[1]:
            raise ValueError(
                f"{key_mask.shape[1]} tokens exceed the KV cache's capacity of "
                f"{self.key_mask.shape[1]}; make it with a larger capacity"
            )
        start = (0, self.next_position)
        kept = self.token_positions
        if kept is not None and token_positions is not None:
            kept = jax.lax.dynamic_update_slice(kept, token_positions, start)
        return replace(
            self,
            key_mask=jax.lax.dynamic_update_slice(self.key_mask, key_mask, start),
            token_positions=kept,
        )

    def write(
        self: C,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B T N_kv H"],
        values: Float[Array, "B T N_kv H"],
    ) -> C:
        """Writes a layer's keys and values at the next T positions."""
        start = (layer, 0, 0, self.next_position, 0)

        def with_new(cached: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(cached, new.swapaxes(1, 2)[None], start)

        return self._written(with_new, keys, values)

    def read(self, layer: Int[Array, ""] | int) -> tuple[Heads, Heads]:
        """Returns the keys and values [B, S, N_kv, H] of a layer at all positions, as stored."""

        def of_layer(cached: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(cached, layer, keepdims=False).swapaxes(1, 2)

        return jax.tree.map(of_layer, self.keys), jax.tree.map(of_layer, self.values)

    def _written(
        self: C,
        with_new: Callable[[Array, Array], Array],
        keys: Float[Array, "B T N_kv H"],
        values: Float[Array, "B T N_kv H"],
    ) -> C:
        """The cache with new keys and values; `with_new` puts [B, T, N_kv, ...] into an array."""

        def written(cached: CachedHeads, new: Float[Array, "B T N_kv H"]) -> CachedHeads:
            return jax.tree.map(with_new, cached, like(new, cached))

        return replace(self, keys=written(self.keys, keys), values=written(self.values, values))

    def advance(self: C, tokens: int, new: NewTokens | None = None) -> C:
        """Counts `tokens` more positions as used; `new` are the tokens, needed for `windows`."""
        return replace(self, used=self.used + tokens, windows=self._advanced(new))

    def _with_rows(self: C, slots: Int[Array, "G P"], new: "KVCache", positions: int) -> C:
        """Copies the first `positions` of other sequences into slots; see `put_rows`.

        `key_mask` becomes False after them.
        """

        def with_new(cached: Array, rows: Array) -> Array:
            return constrained_heads(put_rows(cached, rows[:, :, :, :positions], slots, axis=1))

        def with_rows(kept: Array, rows: Array) -> Array:
            rows = rows[:, :positions]
            rows = jnp.pad(rows, [(0, 0), (0, kept.shape[1] - rows.shape[1])])
            return put_rows(kept, rows, slots)

        own, others = self.token_positions, new.token_positions
        return replace(
            self,
            keys=jax.tree.map(with_new, self.keys, new.keys),
            values=jax.tree.map(with_new, self.values, new.values),
            key_mask=with_rows(self.key_mask, new.key_mask),
            token_positions=None if own is None or others is None else with_rows(own, others),
            windows=tuple(
                cache.admit(slots, new.window_of(cache.window)) for cache in self.windows
            ),
        )

    def constrained(self) -> "KVCache":
        """Constrains the sharding of each array, so that one program's output fits the next."""
        kept = self.token_positions
        return replace(
            self,
            keys=constrained_heads(self.keys),
            values=constrained_heads(self.values),
            key_mask=constrain(self.key_mask, "batch", None),
            used=constrain(self.used, *("batch",)[: self.used.ndim]),
            token_positions=None if kept is None else constrain(kept, "batch", None),
            windows=tuple(cache.constrained() for cache in self.windows),
        )

    def repeated(self, copies: int, capacity: int) -> "KVCache":
        """Repeats each sequence `copies` times in a row, with capacity for `capacity` tokens."""

        def longer(cached: Array) -> Array:
            layers, batch, heads, used, width = cached.shape
            wide = jnp.broadcast_to(cached[:, :, None], (layers, batch, copies, heads, used, width))
            wide = wide.reshape(layers, batch * copies, heads, used, width)
            return constrained_heads(jnp.pad(wide, [(0, 0)] * 3 + [(0, capacity - used), (0, 0)]))

        def wider(row: Array) -> Array:
            return jnp.pad(jnp.repeat(row, copies, axis=0), [(0, 0), (0, capacity - row.shape[1])])

        kept = self.token_positions
        return replace(
            self,
            keys=jax.tree.map(longer, self.keys),
            values=jax.tree.map(longer, self.values),
            key_mask=wider(self.key_mask),
            token_positions=None if kept is None else wider(kept),
            windows=tuple(cache.repeated(copies, capacity) for cache in self.windows),
        )

    def reordered(self, source: Int[Array, "B beams"], since: int) -> "KVCache":
        """Gives beam k of prompt b what its beam `source[b, k]` holds (beam search).

        The beams of a prompt share its first `since` positions, which therefore stay in place.
        """
        if since == self.key_mask.shape[1]:  # one new token, which is never fed back
            return self
        beams = source.shape[1]
        index = source[None, :, :, None, None, None]

        def taken(cached: Array) -> Array:
            recent = cached[:, :, :, since:]
            grouped = recent.reshape(len(recent), -1, beams, *recent.shape[2:])
            moved = jnp.take_along_axis(grouped, index, axis=2).reshape(recent.shape)
            moved = constrained_heads(moved)
            return jax.lax.dynamic_update_slice_in_dim(cached, moved, since, axis=3)

        return replace(
            self,
            keys=jax.tree.map(taken, self.keys),
            values=jax.tree.map(taken, self.values),
            windows=tuple(cache.reordered(source) for cache in self.windows),
        )


@register_pytree
@dataclass(frozen=True, kw_only=True)
class RingCache(KVCache):
    """A cache for continuous batching: its sequences start at different times.

    Positions before `first` hold the prompts; the positions after them are a ring buffer for
    generated tokens. Each decoding step writes the same ring position in every sequence, so a write
    is one slice. A sequence may generate at most as many tokens as the ring has positions: it then
    never overwrites its own, and `key_mask` hides those of the sequence before it in the batch.
    `used` is the full capacity: with one token per step no cached key is in the future.
    """

    turn: Int[Array, ""]
    """Ring position of the next token, counted from `first`."""
    first: int = field(metadata={"static": True})

    @property
    def next_position(self) -> Int[Array, ""]:
        """Cache position of the next token."""
        return self.first + self.turn

    @classmethod
    def around(cls, cache: KVCache, first: int) -> "RingCache":
        """Makes an empty ring cache of an empty cache, with `first` positions for the prompts."""
        return cls(
            keys=cache.keys,
            values=cache.values,
            key_mask=cache.key_mask,
            used=jnp.full((), cache.key_mask.shape[1], jnp.int32),
            token_positions=cache.token_positions,
            windows=cache.windows,
            turn=jnp.zeros((), jnp.int32),
            first=first,
        )

    def advance(self, tokens: int, new: NewTokens | None = None) -> "RingCache":
        """Moves to the next position of the ring."""
        assert tokens == 1
        turn = (self.turn + 1) % (self.key_mask.shape[1] - self.first)
        return replace(self, turn=turn, windows=self._advanced(new))

    def admit(self, slots: Int[Array, "G P"], prompts: KVCache) -> "RingCache":
        """Copies prompts into slots of the batch; see `put_rows`."""
        return self._with_rows(slots, prompts, self.first)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class DraftCache(KVCache):
    """A cache for speculative decoding: each sequence has a next position of its own, `used` [B].

    Every position after the prompts is marked as a key. A query attends to nothing after itself,
    so it never reads what a rejected draft left behind; the next tokens overwrite that.
    """

    @classmethod
    def after_prompts(
        cls, cache: KVCache, prompt_tokens: int, position: Int[Array, " B"], ahead: int
    ) -> "DraftCache":
        """Makes one of a cache that holds prompts in its first `prompt_tokens` positions.

        `position` is that of the first new token in its own sequence. Up to `ahead` draft tokens
        may follow the next token.
        """
        index = jnp.arange(cache.key_mask.shape[1])[None]
        kept = cache.token_positions
        if kept is not None:
            new = position[:, None] + index - prompt_tokens
            kept = jnp.where(index < prompt_tokens, kept, new.astype(kept.dtype))
        return cls(
            keys=cache.keys,
            values=cache.values,
            key_mask=cache.key_mask | (index >= prompt_tokens),
            used=jnp.full(len(position), prompt_tokens, jnp.int32),
            token_positions=kept,
            windows=tuple(window.enlarged(ahead) for window in cache.windows),
        )

    def admit(self, slots: Int[Array, "G P"], others: "DraftCache") -> "DraftCache":
        """Copies sequences into slots of the batch; see `put_rows`.

        They may have a smaller capacity: no query is at a position after it.
        """
        cache = self._with_rows(slots, others, others.key_mask.shape[1])
        return replace(cache, used=put_rows(self.used, others.used, slots))

    def reserve(
        self, key_mask: Bool[Array, "B T"], token_positions: Int[Array, "B T"] | None = None
    ) -> "DraftCache":
        """Returns the cache as it is: its key mask and positions are complete from the start."""
        return self

    def write(
        self,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B T N_kv H"],
        values: Float[Array, "B T N_kv H"],
    ) -> "DraftCache":
        """Writes a layer's keys and values at the next T positions of each sequence."""
        start = jnp.stack([jnp.full_like(self.used, layer), self.used], axis=1)

        def with_new(cached: Array, new: Array) -> Array:
            return jax.lax.scatter(
                *(cached, start, new.swapaxes(1, 2), _ROWS),
                unique_indices=True,
                mode=jax.lax.GatherScatterMode.CLIP,
            )

        return self._written(with_new, keys, values)

    def advance(self, tokens: int, new: NewTokens | None = None) -> "DraftCache":
        """Records new tokens in the windows; `keep` then forgets those that were rejected."""
        return replace(self, windows=self._advanced(new))

    def keep(self, used: Int[Array, " B"], position: Int[Array, " B"]) -> "DraftCache":
        """Forgets the tokens after the first `used` cache positions of each sequence.

        `position` is that of the next token in its own sequence.
        """
        return replace(
            self, used=used, windows=tuple(window.truncated(position) for window in self.windows)
        )


_ROWS = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3),
    inserted_window_dims=(0,),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)
"""Of a scatter that writes [N_kv, T, H] at (layer, position) in each sequence of a `DraftCache`."""
