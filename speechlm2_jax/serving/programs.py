"""The compiled programs of a server. Each has one shape, or one per size of clips."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax import sharding
from speechlm2_jax.generation import served_slots as loop
from speechlm2_jax.generation.decoding import DecodingConfig
from speechlm2_jax.generation.served_slots import (
    NewSequences,
    PromptRows,
    ServedOutput,
    ServedSlots,
    StagedPrompts,
)
from speechlm2_jax.generation.slots import SlotShape
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.perception.perception import PerceptionModes
from speechlm2_jax.sharding import Sharding

_static = partial(jax.jit, static_argnames=("graphdef", "placement"))


@_static
def encode_clip(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    audio: Float[Array, "C S"],
    lengths: Int[Array, " C"],
    placement: Sharding | None,
) -> Float[Array, "C F D"]:
    """Encodes clips of `lengths` samples into frames of the LLM's width."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        modes = PerceptionModes()
        output = network.perception(
            audio, lengths, modes=modes, extents=lengths, dtype=network.dtype
        )
        return output.frames.astype(network.dtype)


@_static
def embed_text(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    tokens: Int[Array, "P T"],
    placement: Sharding | None,
) -> Float[Array, "P T D"]:
    """Looks up the text embeddings of prompts."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return network.llm.embed(tokens).astype(network.dtype)


@partial(jax.jit, donate_argnames="embeds")
def place_clip(
    embeds: Float[Array, "P T D"],
    frames: Float[Array, "1 F D"],
    row: Int[Array, ""],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> Float[Array, "P T D"]:
    """Puts the first `count` frames of a clip at position `start` of a prompt."""
    index = jnp.arange(embeds.shape[1]) - start
    taken = jnp.take(frames[0], jnp.clip(index, 0, frames.shape[1] - 1), axis=0)
    is_clip = (index >= 0) & (index < count)
    is_row = jnp.arange(embeds.shape[0]) == row
    return jnp.where((is_row[:, None] & is_clip[None])[..., None], taken[None], embeds)


@partial(jax.jit, static_argnames=("graphdef", "placement", "prompts", "capacity"))
def stage(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    placement: Sharding | None,
    prompts: int,
    capacity: int,
) -> StagedPrompts:
    """Makes room for the prefill of prompts."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        width = network.config.llm.width
        return _constrained(loop.stage(network.llm, prompts, capacity, width, network.dtype))


@partial(
    jax.jit,
    static_argnames=("graphdef", "placement", "tokens", "is_first"),
    donate_argnames="staged",
)
def extend_prompts(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    staged: StagedPrompts,
    prompts: PromptRows,
    start: Int[Array, ""],
    placement: Sharding | None,
    *,
    tokens: int,
    is_first: bool,
) -> StagedPrompts:
    """Runs `tokens` further positions of staged prompts."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return _constrained(
            loop.extend_prompts(network.llm, staged, prompts, start, tokens, is_first=is_first)
        )


@partial(jax.jit, static_argnames=("graphdef", "placement", "shape"))
def empty(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    decoding: DecodingConfig,
    placement: Sharding | None,
    shape: SlotShape,
) -> ServedSlots:
    """Makes free slots."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return loop.constrained(loop.empty(network.llm, shape, decoding, network.dtype))


@partial(jax.jit, static_argnames=("graphdef", "placement"), donate_argnames="served")
def admit(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    served: ServedSlots,
    staged: StagedPrompts,
    prompts: PromptRows,
    new: NewSequences,
    decoding: DecodingConfig,
    placement: Sharding | None,
) -> ServedSlots:
    """Chooses the first tokens of staged prompts, and puts them into slots."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return loop.constrained(loop.admit(network.llm, served, staged, prompts, new, decoding))


@partial(jax.jit, static_argnames=("graphdef", "placement"), donate_argnames="served")
def decode(
    graphdef: nnx.GraphDef[Salm],
    variables: Layered,
    served: ServedSlots,
    is_kept: Bool[Array, " R"],
    tokens: Int[Array, ""],
    decoding: DecodingConfig,
    placement: Sharding | None,
) -> tuple[ServedSlots, ServedOutput]:
    """Adds up to `tokens` tokens to every open sequence.

    Returns the new slots and, for the host, their tokens whole on every device.
    """
    network: Salm = merge_layers(graphdef, variables)
    with sharding.use(placement):
        served = loop.constrained(loop.decode(network.llm, served, decoding, is_kept, tokens))
        return served, sharding.on_every_device(loop.read(served))


def _constrained(staged: StagedPrompts) -> StagedPrompts:
    hidden = sharding.constrain(staged.hidden, "batch", None, "act_embed")
    return StagedPrompts(staged.cache.constrained(), hidden)
