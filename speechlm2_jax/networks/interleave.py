"""Text and audio in one sequence: a gather of frames and one `where`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from speechlm2_jax.sharding import constrain


def interleave(
    text: Float[Array, "G R T D"],
    frames: Float[Array, "G C F D"],
    audio_index: Int[Array, "G R T"],
) -> Float[Array, "G R T D"]:
    """Puts audio frames where `audio_index` >= 0 and keeps text embeddings elsewhere.

    The index counts clip * F + frame within the group, so the gather is local to each group and
    needs no communication over the batch axes (NeMo: replace_placeholders_and_build_targets).
    """
    groups, clips, capacity, width = frames.shape
    if clips * capacity == 0:
        return text
    flat = constrain(frames.reshape(groups, clips * capacity, width), "batch", None, "act_embed")
    index = jnp.maximum(audio_index, 0).reshape(groups, -1)
    taken = jax.vmap(lambda table, i: jnp.take(table, i, axis=0))(flat, index)
    taken = taken.reshape(*audio_index.shape, width)
    return jnp.where((audio_index >= 0)[..., None], taken, text)
