"""Positions of a Conformer's frames, and the mask of its self-attention."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class FrameMask:
    """What the attention mask of a batch is made from: lengths, contexts, position table."""

    positions: Float[Array, "*B P D"] | None
    """Sinusoids of the distances query - key, largest first; None with absolute positions."""
    lengths: Int[Array, " B"]
    """Real frames of each clip."""
    left: Int[Array, " B"]
    """Frames to the left that a query may attend to; -1 for all."""
    right: Int[Array, " B"]
    """Likewise to the right."""


def sinusoids(numbers: Float[Array, "*N"], width: int) -> Float[Array, "*N D"]:
    """Computes sinusoidal embeddings (Vaswani et al. 2017): even columns sine, odd cosine."""
    rates = np.exp(np.arange(0, width, 2, dtype=np.float32) * np.float32(-np.log(1e4) / width))
    angles = numbers[..., None] * jnp.broadcast_to(rates, (*numbers.shape, width // 2))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*numbers.shape, width)


def distances(first: int, last: int, width: int) -> Float[Array, "P D"]:
    """Embeds the distances query - key from `first` down to `last`."""
    return sinusoids(jnp.asarray(np.arange(first, last - 1, -1, dtype=np.float32)), width)


def attention_mask(
    style: str,
    frame_mask: FrameMask,
    query_positions: Int[Array, "B1 Q"],
    key_positions: Int[Array, "B1 T"],
) -> Bool[Array, "B Q T"]:
    """True where a query frame may attend to a key frame: both real, the key within its context.

    `regular` limits the distance on both sides. `chunked_limited` splits time into chunks of
    right + 1 frames: a query attends to its whole chunk and the left / (right + 1) chunks before.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    left, right = frame_mask.left[:, None, None], frame_mask.right[:, None, None]
    before = (left < 0) | (query - key <= left)
    if style == "regular":
        in_context = before & ((right < 0) | (key - query <= right))
    else:
        chunk = jnp.maximum(right, 0) + 1
        chunks_back = query // chunk - key // chunk
        chunked = (chunks_back >= 0) & ((left < 0) | (chunks_back <= left // chunk))
        in_context = jnp.where(right < 0, before, chunked)
    lengths = frame_mask.lengths[:, None, None]
    is_real = (query < lengths) & (key < lengths) & (key >= 0)
    return in_context & is_real
