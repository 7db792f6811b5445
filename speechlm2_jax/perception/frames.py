"""A batch of frame sequences padded on the right: what every stage of perception hands on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames [B, T, D] and how many of each row are real."""

    frames: Float[Array, "B T D"]
    lengths: Int[Array, " B"]


def is_within(lengths: Int[Array, " B"], length: int) -> Bool[Array, "B T"]:
    """True at steps before each row's length."""
    return jnp.arange(length)[None, :] < lengths[:, None]
