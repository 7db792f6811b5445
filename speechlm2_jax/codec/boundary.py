"""What convolutions see beyond the ends of a row.

The layers of a codec ask their `Boundary` for the samples before and after a sequence, and to zero
what is padding. `SequenceBoundary` serves whole recordings; the boundary of a stream (streaming.py)
remembers the samples of earlier calls instead.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Signal = Float[Array, "B T C"]


class PaddedSequence(NamedTuple):
    """Rows with further steps around them."""

    values: Float[Array, "B T2 C"]
    zeros: tuple[int, int] = (0, 0)
    """Steps of zeros before and after that are not written: convolutions take them as read."""

    def materialize(self) -> Float[Array, "B T3 C"]:
        """All steps."""
        return jnp.pad(self.values, ((0, 0), self.zeros, (0, 0)))


@runtime_checkable
class Boundary(Protocol):
    """How layers treat the ends of the rows of a batch."""

    def pad(self, x: Signal, before: int, after: int, mode: str) -> PaddedSequence:
        """Puts `before` and `after` further steps around the rows."""
        ...

    def mask_padding(self, x: Signal) -> Signal:
        """Sets what lies beyond a row to zero."""
        ...

    def downsampled(self, rate: int) -> "Boundary":
        """The same rows at a rate that is divided."""
        ...

    def upsampled(self, rate: int) -> "Boundary":
        """The same rows at a rate that is multiplied."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SequenceBoundary:
    """Edges of rows padded on the right. Steps from a row's length on are zero."""

    lengths: Int[Array, " B"]
    """Real steps of each row."""
    ends: Int[Array, " B"]
    """Where a row is continued by its own steps: at its length, or, as in NeMo, at its batch's."""

    def pad(self, x: Signal, before: int, after: int, mode: str) -> PaddedSequence:
        """Continues rows by zeros, by their own steps mirrored, or by their outermost step.

        Where a row is shorter than what is mirrored of it, the mirror shows zeros. Raises
        ValueError if more is asked for after the row than before it.
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
            if mode == "reflect":  # the row's last steps but one, from what lies before it on
                start, count = last + before - after, after
            else:
                start, count = last + before, 1
            tail = jax.lax.dynamic_slice(sequence, (start, 0), (count, sequence.shape[1]))
            tail = jnp.broadcast_to(tail[::-1], (after, sequence.shape[1]))
            return jax.lax.dynamic_update_slice(sequence, tail, (last + before + 1, 0))

        x = jnp.concatenate([left, jnp.pad(x, ((0, 0), (0, after), (0, 0)))], axis=1)
        return PaddedSequence(jax.vmap(continue_end)(x, last))

    def mask_padding(self, x: Signal) -> Signal:
        """Zeros from each row's length on."""
        is_real = jnp.arange(x.shape[1])[None] < self.lengths[:, None]
        return jnp.where(is_real[..., None], x, 0.0)

    def downsampled(self, rate: int) -> "Boundary":
        """The same rows at a rate divided by `rate`."""
        # not `//`, whose care for signs XLA repeats in every layer
        divided = [jax.lax.div(x, jnp.full_like(x, rate)) for x in (self.lengths, self.ends)]
        return SequenceBoundary(lengths=divided[0], ends=divided[1])

    def upsampled(self, rate: int) -> "Boundary":
        """The same rows at a rate multiplied by `rate`."""
        return SequenceBoundary(lengths=self.lengths * rate, ends=self.ends * rate)
