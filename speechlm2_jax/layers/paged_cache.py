"""KV cache for continuous batching as the TPU's kernel for ragged sequences reads it."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.quantized import QuantizedArray
from speechlm2_jax.layers.ragged_attention import PAGE_TOKENS, PAGES_AXES, Pages
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.layers.window_cache import NewTokens, WindowCache, WithWindows
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain, on_shards


@register_pytree
@dataclass(frozen=True, kw_only=True)
class PagedCache(WithWindows):
    """Each sequence has adjacent pages of its own, which its tokens fill in order, without gaps.

    ```
                 positions 0 to 127   128 to 255         256 to 383
    sequence 0   prompt prompt prom   pt token token     ...          used = 150
    sequence 1   prompt token token   ...                             used = 30
    ```

    A decoding step reads the blocks of pages that hold tokens of open sequences. A sequence that
    has ended writes at a position that nobody reads, and reads its first block.
    """

    pages: Float[Array, "L B S M H"]
    """M = 2 N_kv: the key and the value of each head side by side."""
    used: Int[Array, " B"]
    """Tokens of each sequence."""
    is_open: Bool[Array, " B"]
    """Whether the sequence takes the new token."""
    prompt_tokens: int = field(metadata={"static": True})
    """The longest prompt that is admitted."""

    @property
    def key_mask(self) -> Bool[Array, "B S"]:
        """True at the tokens of a sequence and at its next position."""
        return jnp.arange(self.pages.shape[2])[None] <= self.used[:, None]

    @property
    def token_positions(self) -> None:
        """Not kept: chunked attention has no pages."""
        return None

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations that keys and values were computed in."""
        return jnp.dtype(self.pages.dtype)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        dtype: DTypeLike,
        prompt_tokens: int,
        windows: tuple[WindowCache, ...] = (),
    ) -> "PagedCache":
        """Makes an empty cache; `shape` is (L, B, S, N_kv, H), S is rounded up to whole pages."""
        layers, batch, capacity, heads, width = shape
        capacity += -capacity % PAGE_TOKENS
        pages = jnp.zeros((layers, batch, capacity, 2 * heads, width), dtype)
        return cls(
            pages=constrain(pages, *PAGES_AXES),
            used=jnp.zeros(batch, jnp.int32),
            is_open=jnp.zeros(batch, bool),
            prompt_tokens=prompt_tokens,
            windows=windows,
        )

    def reserve(
        self, key_mask: Bool[Array, "B 1"], token_positions: Int[Array, "B 1"] | None = None
    ) -> "PagedCache":
        """Takes one new token of each sequence where the mask is True."""
        return replace(self, is_open=key_mask[:, 0])

    def write(
        self,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B 1 N_kv H"],
        values: Float[Array, "B 1 N_kv H"],
    ) -> "PagedCache":
        """Writes a layer's keys and values at the next position of each sequence."""

        def local(
            kept: Float[Array, "L b S m H"],
            new: Float[Array, "b 1 m H"],
            layer: Int[Array, ""],
            used: Int[Array, " b"],
        ) -> Float[Array, "L b S m H"]:
            sequence = jnp.arange(kept.shape[1])
            return kept.at[layer, sequence, used].set(new[:, 0], mode="drop", unique_indices=True)

        new = side_by_side(keys, values)
        axes = (PAGES_AXES, ("batch", None, "act_heads", None), (), ("batch",))
        arrays = (self.pages, new, jnp.asarray(layer, jnp.int32), self.used)
        return replace(self, pages=on_shards(local, arrays, axes, PAGES_AXES))

    def read(self, layer: Int[Array, ""] | int) -> tuple[Pages, Pages]:
        """Returns the pages of a layer, which hold the keys and the values."""
        pages = Pages(self.pages, layer, jnp.where(self.is_open, self.used + 1, 1))
        return pages, pages

    def advance(self, tokens: int, new: NewTokens | None = None) -> "PagedCache":
        """Counts the new token of each sequence that took one."""
        used = self.used + self.is_open
        return replace(self, used=used, windows=self._advanced(new))

    def admit(self, slots: Int[Array, "G P"], prompts: KVCache) -> "PagedCache":
        """Copies prompts into slots of the batch, without their masked tokens; see `put_rows`."""
        assert not isinstance(prompts.keys, QuantizedArray)
        assert not isinstance(prompts.values, QuantizedArray)
        first = self.prompt_tokens
        mask = prompts.key_mask[:, :first]
        count = jnp.sum(mask, axis=1, dtype=jnp.int32)
        is_whole = jnp.all(mask == (jnp.arange(mask.shape[1])[None] < count[:, None]))
        order = jnp.argsort(~mask, axis=1, stable=True)[None, :, None, :, None]

        def closed_up(kept: Array) -> Array:
            return jnp.take_along_axis(kept, order, axis=3)

        keys, values = (
            jax.lax.cond(is_whole, lambda x: x, closed_up, kept[:, :, :, :first])
            for kept in (prompts.keys, prompts.values)
        )
        rows = side_by_side(keys.swapaxes(2, 3), values.swapaxes(2, 3))  # [L, B, T, M, H]
        return replace(
            self,
            pages=constrain(put_rows(self.pages, rows, slots, axis=1), *PAGES_AXES),
            used=put_rows(self.used, count, slots),
            windows=tuple(
                cache.admit(slots, prompts.window_of(cache.window)) for cache in self.windows
            ),
        )

    def constrained(self) -> "PagedCache":
        """Constrains the sharding of each array, so that one program's output fits the next."""
        return replace(
            self,
            pages=constrain(self.pages, *PAGES_AXES),
            used=constrain(self.used, "batch"),
            is_open=constrain(self.is_open, "batch"),
            windows=tuple(cache.constrained() for cache in self.windows),
        )


def side_by_side(
    keys: Float[Array, "*any N_kv H"], values: Float[Array, "*any N_kv H"]
) -> Float[Array, "*any M H"]:
    """The key and the value of each head, in this order, head by head: M = 2 N_kv."""
    both = jnp.stack([keys, values], axis=-2)
    return both.reshape(*keys.shape[:-2], -1, keys.shape[-1])
