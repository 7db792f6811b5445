"""Keys and values of past steps, in arrays of a fixed capacity."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """What attention remembers of one conversation per row.

    A step takes the next slot in every row, so slots are in order of time; rows that are shorter
    than others have slots that are no keys. One call announces its steps, each layer writes and
    reads, then the cache advances.
    """

    keys: Any
    """[L, B, K, S, H]: of each head one matrix, as the products of attention read it."""
    values: Any
    """[L, B, K, S, H]."""
    key_mask: Any
    """Bool [B, S]: slots that hold a step which others may attend to."""
    used: Any
    """Int32 scalar: slots taken so far; the same in every row."""

    @property
    def next_position(self) -> Int[Array, ""]:
        """Where the next step goes."""
        return self.used

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: Any) -> "KVCache":
        """Makes a cache of L, B, S, K, H that holds nothing; it can be donated."""
        layers, rows, capacity, heads, width = shape
        inside = (layers, rows, heads, capacity, width)
        return cls(
            keys=_placed(jnp.zeros(inside, dtype)),
            values=_placed(jnp.zeros(inside, dtype)),
            key_mask=jnp.zeros((rows, capacity), bool),
            used=jnp.zeros((), jnp.int32),
        )

    def announce(self, key_mask: Bool[Array, "B T"]) -> "KVCache":
        """Marks which of the next T slots will hold keys.

        Raises ValueError if the cache could never hold T steps. Slots already used are known only
        at run time: the caller counts them.
        """
        if key_mask.shape[1] > self.key_mask.shape[1]:
            raise ValueError(
                f"{key_mask.shape[1]} steps do not fit a cache of {self.key_mask.shape[1]}; "
                "make it with a larger capacity"
            )
        return replace(
            self,
            key_mask=jax.lax.dynamic_update_slice(self.key_mask, key_mask, (0, self.next_position)),
        )

    def write(
        self,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B T K H"],
        values: Float[Array, "B T K H"],
    ) -> "KVCache":
        """Puts a layer's keys and values into the next T slots."""
        at = (layer, 0, 0, self.next_position, 0)

        def with_new(memory: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(memory, new.swapaxes(1, 2)[None], at)

        return replace(self, keys=with_new(self.keys, keys), values=with_new(self.values, values))

    def read(
        self, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Gives all slots of a layer."""
        keys, values = (
            jax.lax.dynamic_index_in_dim(memory, layer, keepdims=False).swapaxes(1, 2)
            for memory in (self.keys, self.values)
        )
        return keys, values

    def advance(self, steps: int) -> "KVCache":
        """Counts `steps` slots as used."""
        return replace(self, used=self.used + steps)

    def pinned(self) -> "KVCache":
        """The same, each array where it belongs: what one program leaves, the next finds."""
        return KVCache(
            keys=_placed(self.keys),
            values=_placed(self.values),
            key_mask=constrain(self.key_mask, "batch", None),
            used=constrain(self.used),
        )

    def repeated(self, copies: int, capacity: int) -> "KVCache":
        """Gives every row `copies` times, one after the other, with room for `capacity` steps."""

        def longer(memory: Array) -> Array:
            layers, rows, heads, capacity, width = memory.shape
            wide = jnp.broadcast_to(
                memory[:, :, None], (layers, rows, copies, heads, capacity, width)
            )
            wide = wide.reshape(layers, rows * copies, heads, capacity, width)
            room = [(0, 0), (0, 0), (0, 0), (0, capacity - capacity), (0, 0)]
            return _placed(jnp.pad(wide, room))

        key_mask = jnp.repeat(self.key_mask, copies, axis=0)
        return replace(
            self,
            keys=longer(self.keys),
            values=longer(self.values),
            key_mask=jnp.pad(key_mask, [(0, 0), (0, capacity - key_mask.shape[1])]),
        )

    def reordered(self, source: Int[Array, "B K"], since: int) -> "KVCache":
        """Puts the memory of copy `source[b, k]` of conversation b into its copy k.

        The rows are K copies of each of B conversations that have had the first `since` slots in
        common: these stay where they are.
        """
        if since == self.key_mask.shape[1]:  # one new token, which is never fed back
            return self
        copies = source.shape[1]
        index = source[None, :, :, None, None, None]

        def taken(memory: Array) -> Array:
            recent = memory[:, :, :, since:]
            grouped = recent.reshape(len(recent), -1, copies, *recent.shape[2:])
            moved = jnp.take_along_axis(grouped, index, axis=2).reshape(recent.shape)
            return jax.lax.dynamic_update_slice_in_dim(memory, _placed(moved), since, axis=3)

        return replace(self, keys=taken(self.keys), values=taken(self.values))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RingCache(KVCache):
    """A cache whose rows began at different times: prompts, then a ring that all rows go round.

    One call of one step takes the next slot of the ring in every row, whatever its age, so that a
    write is one slice. A row that never takes more steps than the ring has slots overwrites nothing
    of its own, and what others have left is no key of it. `used` says that every slot may hold a
    key: one step at a time nothing else lies in the future.
    """

    turn: Any
    """Int32 scalar: steps of the ring so far, in its slots from `first`."""
    first: int = field(metadata={"static": True})

    @property
    def next_position(self) -> Int[Array, ""]:
        """Where the next step goes."""
        return self.first + self.turn

    @classmethod
    def around(cls, cache: KVCache, first: int) -> "RingCache":
        """Makes an empty one of an empty cache, whose prompts have the slots before `first`."""
        return cls(
            keys=cache.keys,
            values=cache.values,
            key_mask=cache.key_mask,
            used=jnp.full((), cache.key_mask.shape[1], jnp.int32),
            turn=jnp.zeros((), jnp.int32),
            first=first,
        )

    def advance(self, steps: int) -> "RingCache":
        """Goes on to the next slot of the ring."""
        assert steps == 1
        return replace(self, turn=(self.turn + 1) % (self.key_mask.shape[1] - self.first))

    def admit(self, rows: Int[Array, " G"], prompts: KVCache) -> "RingCache":
        """Gives rows the first slots of other conversations; rows beyond the last are dropped."""
        steps = self.first

        def with_new(memory: Array, new: Array) -> Array:
            new = new[:, :, :, :steps]
            return memory.at[:, rows, :, : new.shape[3]].set(new, mode="drop")

        key_mask = prompts.key_mask[:, :steps]
        key_mask = jnp.pad(key_mask, [(0, 0), (0, self.key_mask.shape[1] - key_mask.shape[1])])
        return replace(
            self,
            keys=with_new(self.keys, prompts.keys),
            values=with_new(self.values, prompts.values),
            key_mask=self.key_mask.at[rows].set(key_mask, mode="drop"),
        )


def _placed(memory: Float[Array, "L B K S H"]) -> Float[Array, "L B K S H"]:
    return constrain(memory, None, "batch", "act_heads", None, None)


class CachedOutput(NamedTuple):
    """What a network gives for further steps of cached conversations."""

    hidden: Float[Array, "B T D"]
    cache: KVCache
