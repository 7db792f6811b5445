"""What a decoder asks of the cache of its layers."""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.window_cache import NewTokens, WindowCache

C = TypeVar("C", bound="DecodingCache")


@runtime_checkable
class DecodingCache(Protocol):
    """Keys and values of past tokens of a batch of sequences, for all layers.

    Of T new tokens: `reserve` takes their mask, each layer calls `write` and `read`, `advance`
    counts them.
    """

    @property
    def key_mask(self) -> Bool[Array, "B S"]:
        """True at positions that queries may attend to."""
        ...

    @property
    def used(self) -> Int[Array, ""] | Int[Array, " B"]:
        """Positions taken so far."""
        ...

    @property
    def token_positions(self) -> Int[Array, "B S"] | None:
        """Position of each token in its own sequence, for chunked attention; None without it."""
        ...

    def reserve(
        self: C, key_mask: Bool[Array, "B T"], token_positions: Int[Array, "B T"] | None = None
    ) -> C:
        """Sets the key mask of the next T tokens."""
        ...

    def write(
        self: C,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B T N_kv H"],
        values: Float[Array, "B T N_kv H"],
    ) -> C:
        """Writes a layer's keys and values of the new tokens."""
        ...

    def read(self, layer: Int[Array, ""] | int) -> tuple[Any, Any]:
        """Returns the keys and values of a layer for `attend`, as stored."""
        ...

    def advance(self: C, tokens: int, new: NewTokens | None = None) -> C:
        """Counts the new tokens as used."""
        ...

    def window_of(self, window: int) -> WindowCache:
        """Returns the cache of the layers with this window."""
        ...

    def with_window(self: C, changed: WindowCache) -> C:
        """Replaces the cache of one window."""
        ...


class CachedOutput(NamedTuple):
    """Hidden states of new tokens, and the cache that holds them."""

    hidden: Float[Array, "B T D"]
    cache: Any
    """Of the class of the cache that was given."""
