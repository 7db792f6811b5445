"""The program that turns audio and text into the LLM's input."""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax import sharding
from speechlm2_jax.batches import SalmBatch
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.sharding import Sharding


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def encode(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    batch: SalmBatch[Array],
    placement: Sharding | None = None,
) -> Float[Array, "B T D"]:
    """Encodes audio and interleaves it with the text embeddings. Returns the LLM's input.

    This is a separate program, so that a change of decoding settings does not compile the encoder
    again. `placement` is the sharding if the weights are on several devices.
    """
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        return salm_network.prepare(network, batch, SalmModes()).embeds
