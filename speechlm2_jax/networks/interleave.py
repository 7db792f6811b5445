"""Interleaving of text embeddings and audio frames in one sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from speechlm2_jax.sharding import constrain


def interleave(
    text: Float[Array, "G R T D"],
    frames: Float[Array, "G C F D"],
    audio_index: Int[Array, "G R T"],
) -> Float[Array, "G R T D"]:
    """Replaces text embeddings by audio frames where `audio_index` >= 0.

    A value of `audio_index` is clip x F + frame, where `clip` counts within the group. As no index
    points into another group, the gather needs no communication between devices (NeMo:
    replace_placeholders_and_build_targets).
    """
    groups, clips, capacity, width = frames.shape
    if clips * capacity == 0:
        return text
    flat = constrain(frames.reshape(groups, clips * capacity, width), "batch", None, "act_embed")
    index = jnp.maximum(audio_index, 0).reshape(groups, -1)
    taken = jax.vmap(lambda table, i: jnp.take(table, i, axis=0))(flat, index)
    taken = taken.reshape(*audio_index.shape, width)
    return jnp.where((audio_index >= 0)[..., None], taken, text)
