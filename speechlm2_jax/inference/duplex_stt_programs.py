"""The programs of a duplex speech-to-text model."""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax import sharding
from speechlm2_jax.generation.duplex_stt import SttOutput, run_stt
from speechlm2_jax.generation.forced_turns import ForcedTurns
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.layers.unstacked import Layered, merge_layers
from speechlm2_jax.networks import duplex_stt
from speechlm2_jax.networks.duplex import DuplexModes
from speechlm2_jax.networks.duplex_stt import DuplexStt, SttLogits
from speechlm2_jax.networks.stt_channels import place_after_prompt
from speechlm2_jax.sharding import Sharding


@partial(jax.jit, static_argnames=("graphdef", "rule", "placement"))
def run_offline(
    graphdef: nnx.GraphDef[DuplexStt],
    variables: Layered,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    rule: ForcedTurns | None,
    *,
    placement: Sharding | None = None,
) -> tuple[SttOutput, Int[Array, " B"]]:
    """Generates the tokens of whole recordings: (output, frames of each recording).

    Positions of the output include the system prompts. Both are whole on every device.
    """
    network: DuplexStt = merge_layers(graphdef, variables)
    with sharding.use(placement):
        encoded = duplex_stt.encode_user(network, audio, lengths, DuplexModes())
        embedded = duplex_stt.embed_prompts(network, prompts)
        user = place_after_prompt(embedded, encoded.frames, prompt_lengths, encoded.lengths)
        whole = prompt_lengths + encoded.lengths
        output = run_stt(network, user, prompt_lengths, whole, rule)
        return sharding.on_every_device((output, encoded.lengths))


@partial(jax.jit, static_argnames=("graphdef",))
def logits(
    graphdef: nnx.GraphDef[DuplexStt], variables: Variables, embeds: Float[Array, "B T D"]
) -> SttLogits:
    """Computes the logits of whole conversations of embeddings, with the boosts of inference."""
    network: DuplexStt = merge(graphdef, variables)
    hidden = duplex_stt.forward(network, embeds.astype(network.dtype), DuplexModes())
    return network.inference_logits(hidden)
