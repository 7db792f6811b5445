"""A right-padded batch of frame sequences, as the stages of perception exchange it."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames [B, T, D] and the real length of each sequence."""

    frames: Float[Array, "B T D"]
    lengths: Int[Array, " B"]


def is_within(lengths: Int[Array, " B"], length: int) -> Bool[Array, "B T"]:
    """Makes the padding mask: True at positions below each sequence's length."""
    return jnp.arange(length)[None, :] < lengths[:, None]
