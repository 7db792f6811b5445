"""The compiled programs of a duplex speech-to-text session: the system prompt, and one chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.generation.duplex_stt import SttState, initial_state, next_frame
from speechlm2_jax.generation.forced_turns import ForcedTurns
from speechlm2_jax.layers.unstacked import Layered, merge_layers, read_in_place
from speechlm2_jax.networks.duplex_stt import DuplexStt, embed_prompts
from speechlm2_jax.perception import streaming
from speechlm2_jax.perception.streaming import StreamPlan, StreamState
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SttSessionState:
    """All that a conversation keeps between chunks; B = 1."""

    perception: StreamState
    dialog: SttState


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SttSessionFrames:
    """The tokens of a step; those of frames that are not real have no meaning."""

    text: Int[Array, "B F"]
    user_text: Int[Array, "B F"]
    is_real: Bool[Array, "B F"]


@dataclass(frozen=True, kw_only=True)
class SttSessionProgram:
    """What the programs of a session depend on. Equal ones share their compiled programs."""

    graphdef: nnx.GraphDef[DuplexStt]
    plan: StreamPlan
    rule: ForcedTurns | None
    capacity: int
    """Positions of the KV cache, sinks included."""
    sinks: int
    """First positions that stay in the KV cache: the system prompt and some frames."""


Start = Callable[[Layered, Int[Array, "B P"]], SttSessionState]
Step = Callable[
    [Layered, SttSessionState, Float[Array, "B S"], Int[Array, " B"], Bool[Array, ""]],
    tuple[SttSessionFrames, SttSessionState],
]


@lru_cache(maxsize=16)
def make_start(program: SttSessionProgram) -> Start:
    """Compiles `start(variables, prompt)`: the state after the system prompt [1, P]."""

    def start(variables: Layered, prompt: Int[Array, "B P"]) -> SttSessionState:
        network: DuplexStt = merge_layers(program.graphdef, variables)
        dialog = initial_state(network, 1, program.capacity, program.sinks)
        embeds, is_prompt = embed_prompts(network, prompt), jnp.ones(1, bool)
        network = read_in_place(network)

        def run(t: Array, state: SttState) -> SttState:
            user = jax.lax.dynamic_slice_in_dim(embeds, t, 1, axis=1)
            return next_frame(network, state, user, is_prompt, program.rule)

        if prompt.shape[1]:
            dialog = jax.lax.fori_loop(0, prompt.shape[1], run, dialog)
        perception = streaming.start_stream(program.plan, 1, network.dtype)
        return SttSessionState(perception=perception, dialog=dialog)

    return jax.jit(start)


@lru_cache(maxsize=16)
def make_step(program: SttSessionProgram) -> Step:
    """Compiles `step(variables, state, audio, new, is_interrupted)`, which donates `state`."""

    def step(
        variables: Layered,
        state: SttSessionState,
        audio: Float[Array, "B S"],
        new: Int[Array, " B"],
        is_interrupted: Bool[Array, ""],
    ) -> tuple[SttSessionFrames, SttSessionState]:
        network: DuplexStt = merge_layers(program.graphdef, variables)
        encoded, perception = streaming.advance(
            network.perception, program.plan, state.perception, audio, new
        )
        is_real, eos = encoded.is_real, network.config.text.eos
        text = jnp.where(is_interrupted, eos, state.dialog.text)
        first = jnp.argmax(is_real[0])
        network = read_in_place(network)
        empty = jnp.zeros(is_real.shape, jnp.int32)

        def run(t: Array, carry: tuple[SttState, Array, Array]) -> tuple[SttState, Array, Array]:
            dialog, agent, theirs = carry
            user = jax.lax.dynamic_slice_in_dim(encoded.frames, t, 1, axis=1)
            dialog = next_frame(network, dialog, user, jnp.zeros(1, bool), program.rule)
            agent, theirs = (
                jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], t, axis=1)
                for tokens, token in ((agent, dialog.text), (theirs, dialog.user_text))
            )
            return dialog, agent, theirs

        start = (state.dialog._replace(text=text), empty, empty)
        dialog, agent, theirs = jax.lax.fori_loop(first, first + jnp.sum(is_real[0]), run, start)
        frames = SttSessionFrames(text=agent, user_text=theirs, is_real=is_real)
        return frames, SttSessionState(perception=perception, dialog=dialog)

    return jax.jit(step, donate_argnums=1)
