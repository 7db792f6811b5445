"""KV cache of layers with a sliding window: a ring buffer of the window's size.

The token at position p of its sequence is at ring index p modulo the size of the ring. Padding does
not count as a position, so sequences of different lengths and starts share one array.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from speechlm2_jax.layers.quantized import DTYPES, Heads, QuantizedArray, like
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain

W = TypeVar("W", bound="WithWindows")
NOTHING = -1
"""Position of an empty ring index."""
CachedHeads = Float[Array, "L B N_kv S H"] | QuantizedArray
"""Keys or values of all layers: in the dtype of the activations, or quantized, scales [..., 1]."""


class NewTokens(NamedTuple):
    """T tokens to write to a cache. The real tokens of a sequence are adjacent and in order."""

    positions: Int[Array, "B T"]
    is_real: Bool[Array, "B T"]
    """False at padding."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class WindowCache:
    """Keys and values of the last tokens of each sequence, for all layers with one window size.

    W is the size of the ring: the smaller one of the window and the capacity of the whole cache. So
    no token is overwritten that a window still needs. For T new tokens each layer calls `update`;
    then `advance` records their positions.
    """

    keys: CachedHeads
    """[L, B, N_kv, W, H]."""
    values: CachedHeads
    positions: Int[Array, "B W"]
    """Position of the token at each ring index; `NOTHING` if it is empty."""
    window: int = field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        window: int,
        dtype: DTypeLike,
        kind: str | None = None,
    ) -> "WindowCache":
        """Makes an empty cache; `shape` is (L, B, capacity, N_kv, H), `kind` as for `KVCache`."""
        layers, batch, capacity, heads, width = shape
        size = min(window, capacity)
        stored = (layers, batch, heads, size, width)
        return cls(
            keys=constrained_heads(empty_heads(stored, dtype, kind)),
            values=constrained_heads(empty_heads(stored, dtype, kind)),
            positions=jnp.full((batch, size), NOTHING, jnp.int32),
            window=window,
        )

    def seen(self, new: NewTokens) -> Int[Array, "B S"]:
        """Positions of the keys that `update` returns; `NOTHING` for empty indices and padding."""
        if new.positions.shape[1] == 1:
            return self.advance(new).positions
        fresh = jnp.where(new.is_real, new.positions, NOTHING)
        return jnp.concatenate([self.positions, fresh], axis=1)

    def update(
        self,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B T N_kv H"],
        values: Float[Array, "B T N_kv H"],
        new: NewTokens,
    ) -> tuple["WindowCache", Heads, Heads]:
        """Writes a layer's keys and values; returns those that the new tokens may attend to.

        They are [B, S, N_kv, H], as stored.

        One token attends to the ring after it was written (S = W). Several tokens attend to the
        ring before it was written and to each other (S = W + T): the first of them may need keys
        that the last one overwrites.
        """

        def updated(cached: Array, fresh: Array) -> tuple[Array, Array]:
            old = jax.lax.dynamic_index_in_dim(cached, layer, keepdims=False)
            fresh = fresh.swapaxes(1, 2)  # [B, N_kv, T, H]
            written = self._written(old, fresh, new)
            seen = written if fresh.shape[2] == 1 else jnp.concatenate([old, fresh], axis=2)
            after = jax.lax.dynamic_update_index_in_dim(cached, written, layer, axis=0)
            return after, seen.swapaxes(1, 2)

        both, read = [], []
        for cached, fresh in ((self.keys, keys), (self.values, values)):
            pairs = jax.tree.map(updated, cached, like(fresh, cached))
            after, seen = jax.tree.transpose(
                jax.tree.structure(cached), jax.tree.structure((0, 0)), pairs
            )
            both.append(after)
            read.append(seen)
        return replace(self, keys=both[0], values=both[1]), read[0], read[1]

    def advance(self, new: NewTokens) -> "WindowCache":
        """Records the positions of tokens that every layer has written."""
        source, is_new = self._sources(new)
        fresh = jnp.take_along_axis(new.positions, source, axis=1)
        return replace(self, positions=jnp.where(is_new, fresh, self.positions))

    def constrained(self) -> "WindowCache":
        """Constrains the sharding of each array, so that one program's output fits the next."""
        return replace(
            self,
            keys=constrained_heads(self.keys),
            values=constrained_heads(self.values),
            positions=constrain(self.positions, "batch", None),
        )

    def repeated(self, copies: int, capacity: int) -> "WindowCache":
        """Repeats each sequence `copies` times, for a cache of another capacity."""
        more = max(min(self.window, capacity) - self.positions.shape[1], 0)
        return replace(
            self,
            keys=jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), self.keys),
            values=jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), self.values),
            positions=jnp.repeat(self.positions, copies, axis=0),
        ).padded(more)

    def padded(self, more: int) -> "WindowCache":
        """Adds `more` empty indices to a ring that holds whole sequences in order."""

        def longer(cached: Array) -> Array:
            return constrained_heads(jnp.pad(cached, [(0, 0)] * 3 + [(0, more), (0, 0)]))

        positions = jnp.pad(self.positions, [(0, 0), (0, more)], constant_values=NOTHING)
        return replace(
            self,
            keys=jax.tree.map(longer, self.keys),
            values=jax.tree.map(longer, self.values),
            positions=positions,
        )

    def enlarged(self, more: int) -> "WindowCache":
        """The same tokens in a ring with `more` further indices, for speculative decoding.

        As many draft tokens may then be written and truncated again without a loss: they overwrite
        no token that the window of the token before them needs.
        """
        size = self.positions.shape[1]
        last = jnp.max(self.positions, axis=1, keepdims=True)
        ring = jnp.arange(size + more)[None]
        newest = last - (last - ring) % (size + more)
        source = newest % size
        is_held = (newest >= 0) & (jnp.take_along_axis(self.positions, source, axis=1) == newest)

        def moved(cached: Array) -> Array:
            index = source[None, :, None, :, None]
            return constrained_heads(jnp.take_along_axis(cached, index, axis=3))

        return replace(
            self,
            keys=jax.tree.map(moved, self.keys),
            values=jax.tree.map(moved, self.values),
            positions=jnp.where(is_held, newest, NOTHING),
        )

    def truncated(self, position: Int[Array, " B"]) -> "WindowCache":
        """Forgets the tokens at `position` of their sequence and after it."""
        is_kept = self.positions < position[:, None]
        return replace(self, positions=jnp.where(is_kept, self.positions, NOTHING))

    def reordered(self, source: Int[Array, "B beams"]) -> "WindowCache":
        """Gives beam k of prompt b what its beam `source[b, k]` holds (beam search)."""
        beams = source.shape[1]
        index = (jnp.arange(source.shape[0])[:, None] * beams + source).reshape(-1)
        return replace(
            self,
            keys=constrained_heads(jax.tree.map(lambda x: x[:, index], self.keys)),
            values=constrained_heads(jax.tree.map(lambda x: x[:, index], self.values)),
            positions=self.positions[index],
        )

    def admit(self, slots: Int[Array, "G P"], prompts: "WindowCache") -> "WindowCache":
        """Copies prompts into slots of the batch; see `put_rows`.

        The ring of the prompts may be smaller: a ring smaller than the window holds its whole
        sequence in order.
        """
        whole = prompts.padded(self.positions.shape[1] - prompts.positions.shape[1])

        def with_new(cached: Array, new: Array) -> Array:
            return put_rows(cached, new, slots, axis=1)

        return replace(
            self,
            keys=jax.tree.map(with_new, self.keys, whole.keys),
            values=jax.tree.map(with_new, self.values, whole.values),
            positions=put_rows(self.positions, whole.positions, slots),
        )

    def _written(
        self,
        old: Shaped[Array, "B N_kv W H"],
        fresh: Shaped[Array, "B N_kv T H"],
        new: NewTokens,
    ) -> Shaped[Array, "B N_kv W H"]:
        if fresh.shape[2] == 1:  # a scatter writes one ring index per sequence
            sequence, index = jnp.arange(old.shape[0]), new.positions[:, 0] % old.shape[2]
            index = jnp.where(new.is_real[:, 0], index, old.shape[2])
            return old.at[sequence, :, index].set(fresh[:, :, 0], mode="drop")
        source, is_new = self._sources(new)
        taken = jnp.take_along_axis(fresh, source[:, None, :, None], axis=2)
        return jnp.where(is_new[:, None, :, None], taken, old)

    def _sources(self, new: NewTokens) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
        """For each ring index the newest token (as index into T), and whether there is one."""
        size = self.positions.shape[1]
        first = jnp.argmax(new.is_real, axis=1)[:, None]  # index of the first real token
        count = jnp.sum(new.is_real, axis=1)[:, None]
        start = jnp.take_along_axis(new.positions, first, axis=1)
        last = start + count - 1
        ring = jnp.arange(size)[None]
        newest = last - (last - ring) % size  # greatest position at each ring index, at most `last`
        is_new = (newest >= start) & (count > 0)
        index = jnp.where(is_new, first + newest - start, 0)
        return index.astype(jnp.int32), is_new


@dataclass(frozen=True, kw_only=True)
class WithWindows:
    """What the caches of a decoder have in common: their layers with a sliding window."""

    windows: tuple[WindowCache, ...] = ()
    """Caches of the layers with a sliding window, one per window size."""

    def window_of(self, window: int) -> WindowCache:
        """Returns the cache of the layers with this window."""
        return next(cache for cache in self.windows if cache.window == window)

    def with_window(self: W, changed: WindowCache) -> W:
        """Replaces the cache of one window."""
        return replace(
            self,
            windows=tuple(
                changed if cache.window == changed.window else cache for cache in self.windows
            ),
        )

    def _advanced(self, new: NewTokens | None) -> tuple[WindowCache, ...]:
        if not self.windows:
            return ()
        assert new is not None
        return tuple(cache.advance(new) for cache in self.windows)


def empty_heads(
    shape: tuple[int, int, int, int, int], dtype: DTypeLike, kind: str | None
) -> CachedHeads:
    """Zeros [L, B, N_kv, S, H] that `read` gives in `dtype`; quantized with `kind`."""
    if kind is None:
        return jnp.zeros(shape, dtype)
    return QuantizedArray(jnp.zeros(shape, DTYPES[kind]), jnp.zeros((*shape[:-1], 1), dtype))


def constrained_heads(cached: Any) -> Any:
    """Constrains the sharding of keys or values of all layers."""
    return jax.tree.map(lambda x: constrain(x, None, "batch", "act_heads", None, None), cached)
