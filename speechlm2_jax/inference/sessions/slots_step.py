"""The compiled step of many duplex sessions: one chunk of each conversation that has one waiting.

Conversations are in slots. Their states are arrays with a leading axis of slots, and the step is
that of one session under `jax.vmap`: matmuls read the weights once for all slots. A slot without a
waiting chunk keeps its state bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.codec.codec import Codec
from speechlm2_jax.inference.sessions.duplex_step import (
    AgentFrame,
    SessionFrames,
    SessionProgram,
    SessionState,
    agent_frame,
    ended_turn,
    merged,
    no_frames,
    start_state,
    with_frame,
)
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.layers.unstacked import Layered, merge_layers, read_in_place
from speechlm2_jax.networks.duplex import Duplex
from speechlm2_jax.perception import streaming

SlotStates = tuple[Array, ...]
"""The leaves of a `SessionState`, each with a leading axis of slots."""


class SlotChunks(NamedTuple):
    """The input of a step, per slot."""

    audio: Float[Array, "B S"]
    new: Int[Array, " B"]
    """Real samples of the chunk; fewer than S end the user's audio."""
    is_interrupted: Bool[Array, " B"]
    """Whether the agent's turn ends before this chunk."""
    is_active: Bool[Array, " B"]
    """False: no chunk waits; the slot's state stays as it is."""


SlotStep = Callable[
    [Layered, Variables | None, SlotStates, SlotChunks, Key[Array, " B"] | None],
    tuple[SessionFrames, SlotStates],
]
SlotStart = Callable[[Layered, Int[Array, " K"]], SlotStates]
SlotRestart = Callable[[Layered, Int[Array, " K"], SlotStates, Int[Array, ""]], SlotStates]


@lru_cache(maxsize=16)
def make_slots(program: SessionProgram, slots: int) -> SlotStart:
    """Compiles `start(variables, silence)`: the states of slots before their first chunks."""

    def start(variables: Layered, silence: Int[Array, " K"]) -> SlotStates:
        network: Duplex = merge_layers(program.graphdef, variables)
        fresh = jax.tree.leaves(start_state(network, program, silence))
        return tuple(jnp.broadcast_to(x, (slots, *x.shape)) for x in fresh)

    return jax.jit(start)


@lru_cache(maxsize=16)
def make_restart(program: SessionProgram) -> SlotRestart:
    """Compiles `restart(variables, silence, states, slot)`: one slot is before its first chunk.

    It donates `states`.
    """

    def restart(
        variables: Layered, silence: Int[Array, " K"], states: SlotStates, slot: Int[Array, ""]
    ) -> SlotStates:
        network: Duplex = merge_layers(program.graphdef, variables)
        fresh = jax.tree.leaves(start_state(network, program, silence))
        pairs = zip(states, fresh, strict=True)
        return tuple(jax.lax.dynamic_update_index_in_dim(x, new, slot, 0) for x, new in pairs)

    return jax.jit(restart, donate_argnums=2)


@lru_cache(maxsize=16)
def make_slot_step(program: SessionProgram) -> SlotStep:
    """Compiles `step(variables, codec_variables, states, chunks, rngs)`, which donates `states`."""

    def step(
        variables: Layered,
        codec_variables: Variables | None,
        states: SlotStates,
        chunks: SlotChunks,
        rngs: Key[Array, " B"] | None,
    ) -> tuple[SessionFrames, SlotStates]:
        network, codec = merged(program, variables, codec_variables)
        return _Slots(network, codec, program).advance(states, chunks, rngs)

    return jax.jit(step, donate_argnums=2)


@jax.jit
def put_rng(
    rngs: Key[Array, " B"], rng: Key[Array, " 1"], slot: Int[Array, ""]
) -> Key[Array, " B"]:
    """The random keys of all slots with that of one slot replaced."""
    return rngs.at[slot].set(rng[0])


@dataclass(frozen=True)
class _Slots:
    """The step of one slot, mapped over all of them."""

    network: Duplex
    codec: Codec | None
    program: SessionProgram

    def advance(
        self, states: SlotStates, chunks: SlotChunks, rngs: Key[Array, " B"] | None
    ) -> tuple[SessionFrames, SlotStates]:
        """Runs perception on all chunks, and then their frames one after another."""
        user, is_real, states = jax.vmap(self._encode)(states, chunks)  # [B, F, D], [B, F]
        first = jnp.argmax(is_real, axis=1)
        run = _Slots(read_in_place(self.network), self.codec, self.program)
        some = jnp.any(is_real, axis=0)
        begin, count = jnp.argmax(some), jnp.sum(some)

        def body(t: Array, carry: tuple[SessionFrames, SlotStates]) -> tuple:
            frames, states = carry
            frame_t = jax.lax.dynamic_index_in_dim(user, t, 1)
            is_live = jax.lax.dynamic_index_in_dim(is_real, t, 1, keepdims=False)
            is_silenced = chunks.is_interrupted & (first == t)
            frame, states = jax.vmap(run._frame)(states, frame_t, is_live, is_silenced, rngs)
            return with_frame(frames, frame, t), states

        empty = no_frames(self.network.config, self.codec, is_real)
        return jax.lax.fori_loop(begin, begin + count, body, (empty, states))

    def _encode(
        self, leaves: SlotStates, chunk: SlotChunks
    ) -> tuple[Float[Array, "F D"], Bool[Array, " F"], SlotStates]:
        """The user's frames of one slot, which of them are real, and the new state."""
        state = self._state(leaves)
        encoded, perception = streaming.advance(
            self.network.perception,
            self.program.plan,
            state.perception,
            chunk.audio[None],
            chunk.new[None],
        )
        state = SessionState(
            perception=perception,
            dialog=ended_turn(self.network, state.dialog, chunk.is_interrupted),
            codec=state.codec,
            replacement=state.replacement,
        )
        is_real = encoded.is_real[0] & chunk.is_active
        return encoded.frames[0], is_real, _kept(chunk.is_active, state, leaves)

    def _frame(
        self,
        leaves: SlotStates,
        user: Float[Array, "1 D"],
        is_live: Bool[Array, ""],
        is_silenced: Bool[Array, ""],
        rng: Key[Array, ""] | None,
    ) -> tuple[AgentFrame, SlotStates]:
        """The agent's frame of one slot, and the new state where `is_live`."""
        rngs = None if rng is None else rng[None]
        frame, state = agent_frame(
            *(self.network, self.codec, self.program, self._state(leaves)),
            (user[None], is_silenced, rngs),
        )
        return AgentFrame(*(x[0] for x in frame)), _kept(is_live, state, leaves)

    def _state(self, leaves: SlotStates) -> SessionState:
        """The state of one slot (arrays with an axis of slots do not fit its classes)."""
        found: list[jax.tree_util.PyTreeDef] = []

        def shapes(silence: Int[Array, " K"]) -> list[Array]:
            leaves, structure = jax.tree.flatten(start_state(self.network, self.program, silence))
            found.append(structure)
            return leaves

        codebooks = self.network.config.codebooks.count
        jax.eval_shape(shapes, jax.ShapeDtypeStruct((codebooks,), jnp.int32))
        return jax.tree.unflatten(found[0], leaves)


def _kept(is_new: Bool[Array, ""], state: SessionState, old: SlotStates) -> SlotStates:
    """The leaves of `state` where `is_new`, else those before it."""
    pairs = zip(jax.tree.leaves(state), old, strict=True)
    return tuple(x if x is y else jnp.where(is_new, x, y) for x, y in pairs)
