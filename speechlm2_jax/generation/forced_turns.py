"""Forced turn taking: the user's generated text starts and ends the agent's turns."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from speechlm2_jax.networks.channels import TextIds

_NEVER = -(2**30)
"""A position before every window."""
_NO_TEXT = 2**30
"""Pads in a row where the user has had no text yet: no window is so long."""


@dataclass(frozen=True, kw_only=True)
class ForcedTurns:
    """The rule of NeMo's `force_turn_taking`.

    - Where the user's turn ends, or pads have followed the user's text for exactly
      `pad_window_frames`, the agent's token becomes bos, unless it had one in the last
      `threshold_frames`.
    - Otherwise, where the user's turn starts, it becomes eos, unless it had one in them.
    """

    user_starts: tuple[int, ...]
    user_ends: tuple[int, ...]
    threshold_frames: int = 40
    pad_window_frames: int = 25
    """Also the first position at which anything is forced."""


class TurnHistory(NamedTuple):
    """What the rule knows of the past; [B] each."""

    last_bos: Int[Array, " B"]
    """Position of the agent's last bos."""
    last_eos: Int[Array, " B"]
    user_pads: Int[Array, " B"]
    """Pads since the user's last other token."""


def no_turns(batch: int) -> TurnHistory:
    """The history before the first position."""

    def full(value: int) -> Int[Array, " B"]:
        return jnp.full((batch,), value, jnp.int32)

    return TurnHistory(last_bos=full(_NEVER), last_eos=full(_NEVER), user_pads=full(_NO_TEXT))


def force(
    rule: ForcedTurns,
    history: TurnHistory,
    text: Int[Array, " B"],
    user_text: Int[Array, " B"],
    position: Int[Array, ""],
    ids: TextIds,
) -> Int[Array, " B"]:
    """The agent's tokens at a position, some replaced by bos or eos."""
    window = rule.pad_window_frames
    has_window = (history.user_pads == window) & (window > 0)
    starts = _is_one_of(user_text, rule.user_ends) | has_window
    ends = _is_one_of(user_text, rule.user_starts) & ~starts
    is_late = position >= max(window, 1)
    started = history.last_bos >= position - rule.threshold_frames
    ended = history.last_eos >= position - rule.threshold_frames
    text = jnp.where(starts & ~started & is_late, ids.bos, text)
    return jnp.where(ends & ~ended & is_late, ids.eos, text)


def remember(
    history: TurnHistory,
    text: Int[Array, " B"],
    user_text: Int[Array, " B"],
    position: Int[Array, ""],
    ids: TextIds,
) -> TurnHistory:
    """The history after a position with these tokens."""
    pads = jnp.minimum(history.user_pads + 1, _NO_TEXT)
    return TurnHistory(
        last_bos=jnp.where(text == ids.bos, position, history.last_bos),
        last_eos=jnp.where(text == ids.eos, position, history.last_eos),
        user_pads=jnp.where(user_text == ids.pad, pads, 0),
    )


def _is_one_of(tokens: Int[Array, " B"], ids: tuple[int, ...]) -> Bool[Array, " B"]:
    found = tokens == ids[0]
    for token in ids[1:]:
        found = found | (tokens == token)
    return found
