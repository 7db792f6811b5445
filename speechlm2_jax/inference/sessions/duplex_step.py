"""The compiled step of a duplex session: one chunk of user audio in, the agent's frames out.

A step runs log-mel, encoder and adapter on the chunk; then, for each of its frames, the LLM, the
speech decoder or audio head, and the codec's decoder. Its state has a fixed size and is donated.
It is that of B conversations; those without a chunk keep theirs bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

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
from speechlm2_jax.perception.streaming import StreamOutput, StreamPlan, StreamState
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SessionState:
    """All that conversations keep between chunks."""

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
    is_interrupted: Bool[Array, " B"]
    """Whether the agent's turn ends before this chunk."""
    is_active: Bool[Array, " B"] | None = None
    """False: no chunk, and the conversation's state stays as it is; None: all have one."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SessionFrames:
    """The frames of a step; those that are not real have no meaning."""

    text: Int[Array, "B F"]
    codes: Int[Array, "B F K"]
    audio: Float[Array, "B F A"]
    """A = 0 for a session without audio."""
    is_real: Bool[Array, "B F"]


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
Restart = Callable[[Layered, Int[Array, " K"], SessionState, Int[Array, ""]], SessionState]


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
def make_start(program: SessionProgram, conversations: int = 1) -> Start:
    """Compiles `start(variables, silence)`: the state before the first chunks.

    `silence` are the codec's codes of silence.
    """

    def start(variables: Layered, silence: Int[Array, " K"]) -> SessionState:
        return _new_state(
            merge_layers(program.graphdef, variables), program, conversations, silence
        )

    return jax.jit(start)


@lru_cache(maxsize=16)
def make_restart(program: SessionProgram) -> Restart:
    """Compiles `restart(variables, silence, state, slot)`, which donates `state`.

    Conversation `slot` is then before its first chunk.
    """

    def restart(
        variables: Layered, silence: Int[Array, " K"], state: SessionState, slot: Int[Array, ""]
    ) -> SessionState:
        network: Duplex = merge_layers(program.graphdef, variables)
        fresh = _new_state(network, program, 1, silence)
        return jax.tree.map(lambda kept, new: _with_rows(kept, new, slot), state, fresh)

    return jax.jit(restart, donate_argnums=2)


def _new_state(
    network: Duplex, program: SessionProgram, conversations: int, silence: Int[Array, " K"]
) -> SessionState:
    codebooks = network.config.codebooks
    return SessionState(
        perception=streaming.start_stream(program.plan, conversations, network.dtype),
        dialog=initial_state(
            network,
            conversations,
            program.capacity,
            pad=network.config.text.pad,
            delay=codebooks.delay,
            codebooks=codebooks.count,
            sinks=program.sinks,
        ),
        codec=None if program.codec is None else network.codec.new_stream(conversations),
        replacement=jnp.broadcast_to(silence, (conversations, len(silence))),
    )


def _with_rows(kept: Array, new: Array, slot: Int[Array, ""]) -> Array:
    """Puts the array of one conversation into that of many.

    Their batch axis, first or second, is where they differ; a conversation may have several rows.
    """
    differ = [axis for axis in range(new.ndim) if kept.shape[axis] != new.shape[axis]]
    if not differ:  # one conversation in all
        return new
    axis = differ[0]
    return jax.lax.dynamic_update_slice_in_dim(kept, new, slot * new.shape[axis], axis)


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
        network: Duplex = merge_layers(program.graphdef, variables)
        codec = None
        if program.codec is not None and codec_variables is not None:
            codec = merge(program.codec, codec_variables)
        return _advance(network, codec, program, state, chunk, rngs)

    return jax.jit(step, donate_argnums=2)


def _advance(
    network: Duplex,
    codec: Codec | None,
    program: SessionProgram,
    state: SessionState,
    chunk: UserChunk,
    rngs: Key[Array, " B"] | None,
) -> tuple[SessionFrames, SessionState]:
    encoded, state = _encode(network, program, state, chunk)
    is_any_real = jnp.any(encoded.is_real, axis=0)
    begin, count = jnp.argmax(is_any_real), jnp.sum(is_any_real)
    first = jnp.argmax(encoded.is_real, axis=1)
    network = read_in_place(network)

    def run(t: Array, carry: tuple[SessionFrames, SessionState]) -> tuple:
        frames, state = carry
        user = jax.lax.dynamic_slice_in_dim(encoded.frames, t, 1, axis=1)
        is_real = jax.lax.dynamic_index_in_dim(encoded.is_real, t, axis=1, keepdims=False)
        dialog = next_frame(network, state.dialog, user, program.sampling, rngs, is_real)
        is_silenced = chunk.is_interrupted & (t == first) & is_real
        codes = jnp.where(is_silenced[:, None], network.config.codebooks.eos, dialog.codes)
        dialog = dialog._replace(codes=codes)
        return _decoded(network.config, codec, frames, state, dialog, t)

    empty = _no_frames(network.config, codec, encoded.is_real)
    return jax.lax.fori_loop(begin, begin + count, run, (empty, state))


def _encode(
    network: Duplex, program: SessionProgram, state: SessionState, chunk: UserChunk
) -> tuple[StreamOutput, SessionState]:
    """Encodes a chunk, and ends the turns that are interrupted; not where it is not active."""
    encoded, perception = streaming.advance(
        network.perception, program.plan, state.perception, chunk.audio, chunk.new
    )
    is_ended, is_active = chunk.is_interrupted, chunk.is_active
    if is_active is not None:
        perception = streaming.keep_where(~is_active, state.perception, perception)
        encoded = replace(encoded, is_real=encoded.is_real & is_active[:, None])
        is_ended &= is_active
    text = jnp.where(is_ended, network.config.text.eos, state.dialog.text)
    return encoded, replace(state, perception=perception, dialog=state.dialog._replace(text=text))


def _decoded(
    config: DuplexConfig,
    codec: Codec | None,
    frames: SessionFrames,
    state: SessionState,
    dialog: DuplexState,
    t: Int[Array, ""],
) -> tuple[SessionFrames, SessionState]:
    """Decodes the codes of a frame, and writes the frame at index `t`."""
    is_real = jax.lax.dynamic_index_in_dim(frames.is_real, t, axis=1, keepdims=False)
    replacement = _replacement(config, state, dialog)
    stream, audio = state.codec, frames.audio
    if codec is not None and stream is not None:
        is_control = dialog.codes >= config.codebooks.size
        codes = jnp.where(is_control, replacement, dialog.codes)
        samples, new = codec.decode_step(stream, codes[:, None])
        kept = [
            jnp.where(is_real[:, None, None], x, y)
            for x, y in zip(new.history, stream.history, strict=True)
        ]
        stream = DecoderStream(history=tuple(kept))
        audio = jax.lax.dynamic_update_slice_in_dim(audio, samples[:, None], t, axis=1)
    frames = SessionFrames(
        text=jax.lax.dynamic_update_slice_in_dim(frames.text, dialog.text[:, None], t, axis=1),
        codes=jax.lax.dynamic_update_slice_in_dim(frames.codes, dialog.codes[:, None], t, axis=1),
        audio=audio,
        is_real=frames.is_real,
    )
    replacement = jnp.where(is_real[:, None], replacement, state.replacement)
    state = SessionState(
        perception=state.perception, dialog=dialog, codec=stream, replacement=replacement
    )
    return frames, state


def _replacement(
    config: DuplexConfig, state: SessionState, dialog: DuplexState
) -> Int[Array, "B K"]:
    """The codes that replace control codes, from frame 0 on (`channels.without_control`)."""
    codes, kept = dialog.codes, state.replacement
    if not config.nemo_exact:
        codes = jnp.where(codes >= config.codebooks.size, kept, codes)
    return jnp.where(state.dialog.frame[:, None] == 0, codes, kept)


def _no_frames(
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
