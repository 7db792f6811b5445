"""The compiled step of a duplex session: one chunk of user audio in, the agent's frames out.

A step runs log-mel, encoder and adapter on the chunk; then, for each of its frames, the LLM, the
speech decoder or audio head, and the codec's decoder. Its state has a fixed size and is donated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.codec.codec import Codec
from speechlm2_jax.codec.config import CodecConfig
from speechlm2_jax.codec.streaming import DecoderStream
from speechlm2_jax.generation.duplex import (
    DuplexSamplingConfig,
    DuplexState,
    initial_state,
    next_frame,
)
from speechlm2_jax.layers.module import Variables, abstract, merge, split
from speechlm2_jax.layers.unstacked import Layered, merge_layers, read_in_place
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig
from speechlm2_jax.perception import streaming
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.perception.streaming import StreamPlan, StreamState
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SessionState:
    """All that a conversation keeps between chunks; B = 1."""

    perception: StreamState
    dialog: DuplexState
    codec: DecoderStream | None
    """None for a session without audio."""
    replacement: Int[Array, "B K"]
    """Codes that are decoded in place of control codes: those of the first frame, as offline."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class UserChunk:
    """The input of a step."""

    audio: Float[Array, "B S"]
    new: Int[Array, " B"]
    """Real samples of the chunk; fewer than S end the user's audio."""
    is_interrupted: Bool[Array, ""]
    """Whether the agent's turn ends before this chunk."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SessionFrames:
    """The frames of a step; those that are not real have no meaning."""

    text: Int[Array, "B F"]
    codes: Int[Array, "B F K"]
    audio: Float[Array, "B F A"]
    """A = 0 for a session without audio."""
    is_real: Bool[Array, "B F"]


class AgentFrame(NamedTuple):
    """One frame of the agent."""

    text: Int[Array, " B"]
    codes: Int[Array, "B K"]
    audio: Float[Array, "B A"]


@dataclass(frozen=True, kw_only=True)
class SessionWeights:
    """The network's weights, and the codec's with weight norm folded into the kernels."""

    network: Layered
    codec: Variables | None


Step = Callable[
    [Layered, Variables | None, SessionState, UserChunk, Key[Array, " B"] | None],
    tuple[SessionFrames, SessionState],
]
Start = Callable[[Layered, Int[Array, " K"]], SessionState]


@dataclass(frozen=True, kw_only=True)
class SessionProgram:
    """What the programs of a session depend on. Equal ones share their compiled programs."""

    graphdef: nnx.GraphDef[Duplex]
    codec: nnx.GraphDef[Codec] | None
    """The folded codec; None for a session without audio."""
    plan: StreamPlan
    sampling: DuplexSamplingConfig
    capacity: int
    """Frames of the KV caches, sinks included."""
    sinks: int
    """First frames of a conversation that stay in the KV caches."""


def stream_plan(config: DuplexConfig) -> StreamPlan:
    """The plan of a session's perception: steps of one attention chunk of the encoder.

    Raises ValueError, naming the setting, for a perception module that needs whole clips.
    """
    perception: PerceptionConfig = config.perception
    return StreamPlan(config=perception, frames=streaming.natural_frames(perception))


def fold_codec(
    graphdef: nnx.GraphDef[Duplex], config: CodecConfig, variables: Variables
) -> tuple[nnx.GraphDef[Codec], Variables]:
    """The codec alone, its weight norm folded once and not in every step."""
    folded = abstract(lambda rngs: _folded(Codec(config, rngs=rngs)))
    return split(folded)[0], _fold(graphdef, variables)


@partial(jax.jit, static_argnames=("graphdef",))
def _fold(graphdef: nnx.GraphDef[Duplex], variables: Variables) -> Variables:
    network: Duplex = merge(graphdef, variables)
    return split(_folded(network.codec))[1]


def _folded(codec: Codec) -> Codec:
    codec.fold()
    return codec


@lru_cache(maxsize=16)
def make_start(program: SessionProgram) -> Start:
    """Compiles `start(variables, silence)`: the state before the first chunk.

    `silence` are the codec's codes of silence.
    """

    def start(variables: Layered, silence: Int[Array, " K"]) -> SessionState:
        return start_state(merge_layers(program.graphdef, variables), program, silence)

    return jax.jit(start)


def start_state(
    network: Duplex, program: SessionProgram, silence: Int[Array, " K"]
) -> SessionState:
    """The state before the first chunk; see `make_start`."""
    codebooks = network.config.codebooks
    return SessionState(
        perception=streaming.start_stream(program.plan, 1, network.dtype),
        dialog=initial_state(
            network,
            1,
            program.capacity,
            pad=network.config.text.pad,
            delay=codebooks.delay,
            codebooks=codebooks.count,
            sinks=program.sinks,
        ),
        codec=None if program.codec is None else network.codec.new_stream(1),
        replacement=silence[None],
    )


@lru_cache(maxsize=16)
def make_step(program: SessionProgram) -> Step:
    """Compiles `step(variables, codec_variables, state, chunk, rngs)`, which donates `state`."""

    def step(
        variables: Layered,
        codec_variables: Variables | None,
        state: SessionState,
        chunk: UserChunk,
        rngs: Key[Array, " B"] | None,
    ) -> tuple[SessionFrames, SessionState]:
        network, codec = merged(program, variables, codec_variables)
        return _advance(network, codec, program, state, chunk, rngs)

    return jax.jit(step, donate_argnums=2)


def merged(
    program: SessionProgram, variables: Layered, codec_variables: Variables | None
) -> tuple[Duplex, Codec | None]:
    """The network and the folded codec with their weights."""
    network: Duplex = merge_layers(program.graphdef, variables)
    if program.codec is None or codec_variables is None:
        return network, None
    return network, merge(program.codec, codec_variables)


def _advance(
    network: Duplex,
    codec: Codec | None,
    program: SessionProgram,
    state: SessionState,
    chunk: UserChunk,
    rngs: Key[Array, " B"] | None,
) -> tuple[SessionFrames, SessionState]:
    encoded, perception = streaming.advance(
        network.perception, program.plan, state.perception, chunk.audio, chunk.new
    )
    first = jnp.argmax(encoded.is_real[0])
    end = first + jnp.sum(encoded.is_real[0])
    state = SessionState(
        perception=perception,
        dialog=ended_turn(network, state.dialog, chunk.is_interrupted),
        codec=state.codec,
        replacement=state.replacement,
    )
    network = read_in_place(network)

    def run(t: Array, carry: tuple[SessionFrames, SessionState]) -> tuple:
        frames, state = carry
        user = jax.lax.dynamic_slice_in_dim(encoded.frames, t, 1, axis=1)
        is_silenced = chunk.is_interrupted & (t == first)
        frame, state = agent_frame(network, codec, program, state, (user, is_silenced, rngs))
        return with_frame(frames, frame, t), state

    empty = no_frames(network.config, codec, encoded.is_real)
    return jax.lax.fori_loop(first, end, run, (empty, state))


def agent_frame(
    network: Duplex,
    codec: Codec | None,
    program: SessionProgram,
    state: SessionState,
    inputs: tuple[Float[Array, "B 1 D"], Bool[Array, ""], Key[Array, " B"] | None],
) -> tuple[AgentFrame, SessionState]:
    """Runs LLM, speech decoder or audio head, and the codec's decoder for one user frame.

    `inputs` are the user's frame, whether a turn ends with it (an interruption), and random keys.
    """
    user, is_silenced, rngs = inputs
    dialog = next_frame(network, state.dialog, user, program.sampling, rngs)
    codebooks = network.config.codebooks
    dialog = dialog._replace(codes=jnp.where(is_silenced, codebooks.eos, dialog.codes))
    replacement = _replacement(network.config, state, dialog)
    stream, audio = state.codec, jnp.zeros((len(dialog.codes), 0))
    if codec is not None and stream is not None:
        codes = jnp.where(dialog.codes >= codebooks.size, replacement, dialog.codes)
        audio, stream = codec.decode_step(stream, codes[:, None])
    state = SessionState(
        perception=state.perception, dialog=dialog, codec=stream, replacement=replacement
    )
    return AgentFrame(text=dialog.text, codes=dialog.codes, audio=audio), state


def ended_turn(network: Duplex, dialog: DuplexState, is_ended: Bool[Array, ""]) -> DuplexState:
    """Where `is_ended`, the agent's last text token becomes the end of its turn."""
    text = jnp.where(is_ended, network.config.text.eos, dialog.text)
    return dialog._replace(text=text)


def with_frame(frames: SessionFrames, frame: AgentFrame, t: Int[Array, ""]) -> SessionFrames:
    """Writes a frame at index `t`."""

    def put(kept: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(kept, new[:, None], t, axis=1)

    return SessionFrames(
        text=put(frames.text, frame.text),
        codes=put(frames.codes, frame.codes),
        audio=put(frames.audio, frame.audio),
        is_real=frames.is_real,
    )


def _replacement(
    config: DuplexConfig, state: SessionState, dialog: DuplexState
) -> Int[Array, "B K"]:
    """The codes that replace control codes, from frame 0 on (`channels.without_control`)."""
    codes, kept = dialog.codes, state.replacement
    if not config.nemo_exact:
        codes = jnp.where(codes >= config.codebooks.size, kept, codes)
    return jnp.where(state.dialog.frame == 0, codes, kept)


def no_frames(
    config: DuplexConfig, codec: Codec | None, is_real: Bool[Array, "B F"]
) -> SessionFrames:
    """The output of a step before its first frame."""
    samples = 0 if codec is None else config.codec.samples_per_frame
    return SessionFrames(
        text=jnp.zeros(is_real.shape, jnp.int32),
        codes=jnp.zeros((*is_real.shape, config.codebooks.count), jnp.int32),
        audio=jnp.zeros((*is_real.shape, samples)),
        is_real=is_real,
    )
