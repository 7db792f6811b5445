"""What convolutions see beyond the ends of a sequence.

A layer asks its `Boundary` for the samples before and after a sequence, and to zero the padding.
`SequenceBoundary` is for whole recordings. `StreamBoundary` (streaming.py) gives the samples of
earlier calls instead.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from speechlm2_jax.pytrees import register_pytree

Signal = Float[Array, "B T C"]


class PaddedSequence(NamedTuple):
    """Sequences with context on both sides."""

    values: Float[Array, "B T2 C"]
    zeros: tuple[int, int] = (0, 0)
    """Further zeros before and after, not materialized: left to the convolution's `padding`."""

    def materialize(self) -> Float[Array, "B T3 C"]:
        """Returns the values with the zeros."""
        return jnp.pad(self.values, ((0, 0), self.zeros, (0, 0)))


@runtime_checkable
class Boundary(Protocol):
    """How layers treat the ends of the sequences of a batch."""

    def pad(self, x: Signal, before: int, after: int, mode: str) -> PaddedSequence:
        """Adds `before` and `after` positions of context to each sequence."""
        ...

    def mask_padding(self, x: Signal) -> Signal:
        """Zeroes the positions beyond each sequence."""
        ...

    def downsampled(self, rate: int) -> "Boundary":
        """Returns the boundary at a rate divided by `rate`."""
        ...

    def upsampled(self, rate: int) -> "Boundary":
        """Returns the boundary at a rate multiplied by `rate`."""
        ...


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SequenceBoundary:
    """Boundary of right-padded sequences. Positions from a sequence's length on are zero."""

    lengths: Int[Array, " B"]
    """Real positions of each sequence."""
    ends: Int[Array, " B"]
    """Where padding modes act: at each sequence's length or, as in NeMo, at the batch's."""

    def pad(self, x: Signal, before: int, after: int, mode: str) -> PaddedSequence:
        """Pads sequences with zeros, by reflection, or by repeating the outermost position.

        Reflection beyond the length of a short sequence gives zeros. Raises ValueError if `after`
        exceeds `before`.
        """
        if mode == "zeros":
            return PaddedSequence(x, (before, after))
        if after > before:
            raise ValueError(f"after={after} must not exceed before={before}")
        left = jnp.repeat(x[:, :1], before, axis=1)
        if mode == "reflect":
            left = jnp.pad(x, ((0, 0), (0, before), (0, 0)))[:, before:0:-1]
        last = jnp.maximum(self.ends - 1, 0)

        def continue_end(
            sequence: Float[Array, "T2 C"], last: Int[Array, ""]
        ) -> Float[Array, "T2 C"]:
            if mode == "reflect":  # the `after` positions before the last one
                start, count = last + before - after, after
            else:
                start, count = last + before, 1
            tail = jax.lax.dynamic_slice(sequence, (start, 0), (count, sequence.shape[1]))
            tail = jnp.broadcast_to(tail[::-1], (after, sequence.shape[1]))
            return jax.lax.dynamic_update_slice(sequence, tail, (last + before + 1, 0))

        x = jnp.concatenate([left, jnp.pad(x, ((0, 0), (0, after), (0, 0)))], axis=1)
        return PaddedSequence(jax.vmap(continue_end)(x, last))

    def mask_padding(self, x: Signal) -> Signal:
        """Zeroes the positions from each sequence's length on."""
        is_real = jnp.arange(x.shape[1])[None] < self.lengths[:, None]
        return jnp.where(is_real[..., None], x, 0.0)

    def downsampled(self, rate: int) -> "Boundary":
        """Returns the boundary at a rate divided by `rate`."""
        # not `//`: its handling of signs would be repeated in every layer
        divided = [jax.lax.div(x, jnp.full_like(x, rate)) for x in (self.lengths, self.ends)]
        return SequenceBoundary(lengths=divided[0], ends=divided[1])

    def upsampled(self, rate: int) -> "Boundary":
        """Returns the boundary at a rate multiplied by `rate`."""
        return SequenceBoundary(lengths=self.lengths * rate, ends=self.ends * rate)
