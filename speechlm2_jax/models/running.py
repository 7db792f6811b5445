"""Parts of a model run alone, compiled."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.module import Variables, bind
from speechlm2_jax.perception.perception import PerceptionModes


@partial(jax.jit, static_argnames=("definition",))
def perceive(
    definition: Any,
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Int[Array, " B"]]:
    """Runs perception alone, in evaluation mode."""
    network = bind(definition, variables)
    output = network.perception(audio, lengths, modes=PerceptionModes(), dtype=network.dtype)
    return output.frames, output.lengths


@partial(jax.jit, static_argnames=("definition",))
def text_logits(
    definition: Any,
    variables: Variables,
    embeds: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
    """Runs the LLM alone over embeddings; positions are 0..T-1 for every row."""
    network = bind(definition, variables)
    positions = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
    hidden = network.llm(
        embeds.astype(network.dtype),
        positions=positions,
        segments=jnp.ones(mask.shape, jnp.int32),
        is_key=mask,
    )
    return network.llm.logits(hidden)
