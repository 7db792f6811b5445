"""Perception and LLM of a model as separate programs, and the device of a model."""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.networks.duplex import Duplex
from speechlm2_jax.networks.duplex_stt import DuplexStt
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.perception.perception import PerceptionModes

N = TypeVar("N", Salm, Duplex)
P = TypeVar("P", Salm, Duplex, DuplexStt)


def device_of(variables: Variables | None) -> jax.Device:
    """The first device that holds weights, or the default device if no weights are loaded."""
    for value in (variables or {}).values():
        if isinstance(value, jax.Array):
            return min(value.devices(), key=lambda device: device.id)
    return jnp.zeros(()).devices().pop()


def on_default_device(variables: Variables) -> Variables:
    """Puts variables on the default device, one by one; takes them out of `variables`.

    A CPU takes aligned host memory, as loading makes it, without a copy. Dtypes that JAX does not
    hold (float64) stay on the host.
    """
    device = jnp.zeros(()).devices().pop()
    placed: Variables = {}
    for path in list(variables):
        value = variables.pop(path)
        is_held = jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype
        placed[path] = jax.device_put(value, device) if is_held else value
    return placed


@partial(jax.jit, static_argnames=("graphdef",))
def perceive(
    graphdef: nnx.GraphDef[P],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Int[Array, " B"]]:
    """Runs perception alone, in evaluation mode."""
    network = merge(graphdef, variables)
    output = network.perception(audio, lengths, modes=PerceptionModes(), dtype=network.dtype)
    return output.frames, output.lengths


@partial(jax.jit, static_argnames=("graphdef",))
def text_logits(
    graphdef: nnx.GraphDef[N],
    variables: Variables,
    embeds: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
    """Runs the LLM alone over embeddings; positions are 0..T-1 for every sequence."""
    network = merge(graphdef, variables)
    return network.llm.logits(hidden_states(network, embeds, mask))


def hidden_states(
    network: Salm | Duplex, embeds: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Runs a network's LLM over whole sequences. `mask` is False at padding; None: no padding."""
    rows = embeds.shape[:2]
    return network.llm(
        embeds.astype(network.dtype),
        positions=jnp.broadcast_to(jnp.arange(rows[1], dtype=jnp.int32), rows),
        segments=jnp.ones(rows, jnp.int32),
        attention_mask=jnp.ones(rows, bool) if mask is None else mask,
        unpacked=mask is None,
    )
