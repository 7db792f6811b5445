"""Duplex speech-to-text generation: one text token of the agent per frame, greedy as in NeMo."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from speechlm2_jax.generation.forced_turns import (
    ForcedTurns,
    TurnHistory,
    force,
    no_turns,
    remember,
)
from speechlm2_jax.layers.unstacked import read_in_place
from speechlm2_jax.networks.duplex_stt import DuplexStt


class SttOutput(NamedTuple):
    """Text tokens of the agent, and of the user (pads without a user-text head)."""

    text: Int[Array, "B T"]
    user_text: Int[Array, "B T"]


class SttState(NamedTuple):
    """State of the decoding loop after some position."""

    network: PyTree
    """KV cache."""
    text: Int[Array, " B"]
    """Text token of the last position."""
    user_text: Int[Array, " B"]
    turns: TurnHistory
    position: Int[Array, ""]
    """Number of positions so far, those of the system prompt included."""


def initial_state(
    network: DuplexStt, batch: int, capacity: int, sinks: int | None = None
) -> SttState:
    """The state before the first position: pad tokens."""
    pads = jnp.full((batch,), network.config.text.pad, jnp.int32)
    return SttState(
        network=network.new_state(batch, capacity, sinks),
        text=pads,
        user_text=pads,
        turns=no_turns(batch),
        position=jnp.zeros((), jnp.int32),
    )


def next_frame(
    network: DuplexStt,
    state: SttState,
    user: Float[Array, "B 1 D"],
    is_prompt: Bool[Array, " B"],
    rule: ForcedTurns | None,
) -> SttState:
    """Runs one position. A position of the system prompt gives the pad token on both channels."""
    ids = network.config.text
    logits, cache = network.decode_frame(
        state.network, user, state.text[:, None], state.user_text[:, None]
    )
    text = jnp.argmax(logits.text[:, 0], axis=-1).astype(jnp.int32)
    user_text = jnp.full_like(text, ids.pad)
    if logits.user_text is not None:
        chosen = jnp.argmax(logits.user_text[:, 0], axis=-1).astype(jnp.int32)
        user_text = jnp.where(is_prompt, ids.pad, chosen)
    if rule is not None:
        text = force(rule, state.turns, text, user_text, state.position, ids)
    text = jnp.where(is_prompt, ids.pad, text)
    return SttState(
        network=cache,
        text=text,
        user_text=user_text,
        turns=remember(state.turns, text, user_text, state.position, ids),
        position=state.position + 1,
    )


def run_stt(
    network: DuplexStt,
    user: Float[Array, "B T D"],
    prompt_lengths: Int[Array, " B"],
    lengths: Int[Array, " B"],
    rule: ForcedTurns | None,
) -> SttOutput:
    """Runs whole conversations of `lengths` positions, of which the first are system prompts.

    Later positions get the pad token.
    """
    pad, width = network.config.text.pad, user.shape[1]
    empty = jnp.full(user.shape[:2], pad, jnp.int32)
    last = jnp.minimum(jnp.max(lengths, initial=0), width)
    Carry = tuple[SttState, Array, Array]

    def is_unfinished(carry: Carry) -> Array:
        return carry[0].position < last

    def advance(carry: Carry) -> Carry:
        state, text, user_text = carry
        t = state.position
        frame = jax.lax.dynamic_slice_in_dim(user, t, 1, axis=1)
        state = next_frame(network, state, frame, t < prompt_lengths, rule)
        text, user_text = (
            jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], t, axis=1)
            for tokens, new in ((text, state.text), (user_text, state.user_text))
        )
        return state, text, user_text

    network = read_in_place(network)
    start = initial_state(network, *user.shape[:2])
    _, text, user_text = jax.lax.while_loop(is_unfinished, advance, (start, empty, empty))
    is_real = jnp.arange(width)[None] < lengths[:, None]
    return SttOutput(*(jnp.where(is_real, tokens, pad) for tokens in (text, user_text)))
