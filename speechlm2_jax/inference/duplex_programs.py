"""The programs of a duplex model: whole recordings to tokens, and codes to audio."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax import sharding
from speechlm2_jax.generation.duplex import (
    DuplexOutput,
    DuplexSamplingConfig,
    initial_state,
    run_duplex,
)
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.networks import duplex as duplex_network
from speechlm2_jax.networks.channels import without_control
from speechlm2_jax.networks.duplex import Duplex
from speechlm2_jax.sharding import Sharding

SILENT_FRAMES = 16
"""Frames of silence such that the receptive field of the middle frame is silence only."""


@partial(jax.jit, static_argnames=("graphdef", "config", "placement"))
def run_offline(
    graphdef: nnx.GraphDef[Duplex],
    variables: Layered,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    config: DuplexSamplingConfig,
    rng: Key[Array, ""] | None,
    *,
    placement: Sharding | None = None,
) -> tuple[DuplexOutput, Int[Array, " B"]]:
    """Generates the agent's tokens for whole recordings: (output, frames of each recording).

    Both are whole on every device of `placement`.
    """
    network: Duplex = merge_layers(graphdef, variables)
    codebooks, pad = network.config.codebooks, network.config.text.pad
    with sharding.use(placement):
        encoder_output = duplex_network.encode_user(network, audio, lengths)
        frames = encoder_output.frames
        rngs = None if rng is None else conversation_rngs(rng, len(audio))
        state = initial_state(
            network,
            *frames.shape[:2],
            pad=pad,
            delay=codebooks.delay,
            codebooks=codebooks.count,
        )
        lengths = encoder_output.lengths
        output = run_duplex(network, frames, lengths, state, config, pad=pad, rngs=rngs)
        return sharding.on_every_device((output, lengths))


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def decode_codes(
    graphdef: nnx.GraphDef[Duplex],
    variables: Variables,
    codes: Int[Array, "B T K"],
    lengths: Int[Array, " B"],
    silence: Int[Array, " K"],
    longest: Int[Array, ""] | int,
    *,
    placement: Sharding | None = None,
) -> tuple[Float[Array, "B A"], Int[Array, " B"]]:
    """Decodes the agent's audio; control codes become silence.

    With `nemo_exact` every conversation is padded to `longest` frames, as in NeMo.
    """
    network: Duplex = merge(graphdef, variables)
    with sharding.use(placement):
        config = network.config
        codes = without_control(codes, silence, config.codebooks, nemo_exact=config.nemo_exact)
        extent = jnp.asarray(longest) if config.nemo_exact else None
        decoded = network.codec.decode(codes, lengths, nemo_exact=config.nemo_exact, extent=extent)
        return sharding.on_every_device((decoded.audio, decoded.lengths))


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def silent_codes(
    graphdef: nnx.GraphDef[Duplex], variables: Variables, *, placement: Sharding | None = None
) -> Int[Array, " K"]:
    """The codec's codes of silence."""
    network: Duplex = merge(graphdef, variables)
    samples = SILENT_FRAMES * network.config.codec.samples_per_frame
    silence = jnp.zeros((1, samples), jnp.float32)
    codes = network.codec.encode(silence, jnp.array([samples])).codes[0, SILENT_FRAMES // 2]
    with sharding.use(placement):
        return sharding.on_every_device(codes)


def conversation_rngs(rng: Key[Array, ""], batch: int) -> Key[Array, " B"]:
    """A random key for each conversation of a batch."""
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(batch))
