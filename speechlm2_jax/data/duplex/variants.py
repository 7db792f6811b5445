"""The examples that augmentation makes of a conversation of two voices, with their lengths.

Both recordings and the times of turns change together, so that they stay alongside.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from speechlm2_jax.data.augmentation.changes import SHARES_BEFORE
from speechlm2_jax.data.augmentation.config import AugmentationConfig
from speechlm2_jax.data.augmentation.variants import padded, shortened, truncation, windows
from speechlm2_jax.data.duplex.conversations import (
    DuplexConversation,
    Placement,
    SpokenTurn,
)

_TOLERANCE_S = 1e-3
"""By which a turn may reach beyond a stretch that it lies in, as in Lhotse."""
_SAME = 1e-9


def with_variants(
    conversations: Sequence[DuplexConversation], config: AugmentationConfig
) -> Sequence[DuplexConversation]:
    """All examples of many conversations: cut off or in windows, padded."""
    if not (
        config.truncate_duration or config.cut_into_windows_duration or config.pad_min_duration
    ):
        return conversations
    return [
        _padded(window, config)
        for conversation in conversations
        for window in _windows(_truncated(conversation, config), config)
    ]


def at_place(conversation: DuplexConversation, place: float) -> DuplexConversation:
    """A conversation whose start, or silence, is drawn: its turns as they are at that place."""
    drawn = conversation.placement
    if drawn is None:
        return conversation
    turns = conversation.turns
    if drawn.room_s:
        turns = _turns(turns, place * drawn.room_s, drawn.stretch_s, keep=drawn.keeps_turns)
    return replace(conversation, turns=_shifted(turns, place * drawn.silence_s), placement=None)


def _truncated(conversation: DuplexConversation, config: AugmentationConfig) -> DuplexConversation:
    most_s = config.truncate_duration
    if most_s is None or conversation.duration_s <= most_s:
        return conversation
    start_s, room_s = truncation(conversation.duration_s, config)
    return _part(conversation, start_s, most_s, config, room_s)


def _windows(
    conversation: DuplexConversation, config: AugmentationConfig
) -> Iterator[DuplexConversation]:
    if config.cut_into_windows_duration is None:
        yield conversation
        return
    for number, (start_s, seconds) in enumerate(windows(conversation.duration_s, config)):
        part = _part(conversation, start_s, seconds, config)
        yield replace(part, id=f"{conversation.id}-{number}")


def _part(
    conversation: DuplexConversation,
    start_s: float,
    duration_s: float,
    config: AugmentationConfig,
    room_s: float = 0.0,
) -> DuplexConversation:
    """A stretch of a conversation; turns of one with room are chosen when its place is drawn."""
    drawn = conversation.placement or Placement()
    room_s, keep = room_s + drawn.room_s, config.keep_excessive_supervisions
    turns = conversation.turns
    return replace(
        conversation,
        duration_s=duration_s,
        source=shortened(conversation.source, start_s, duration_s, room_s - drawn.room_s),
        target=shortened(conversation.target, start_s, duration_s, room_s - drawn.room_s),
        turns=_shifted(turns, -start_s)
        if room_s
        else _turns(turns, start_s, duration_s, keep=keep),
        placement=Placement(room_s=room_s, stretch_s=duration_s, keeps_turns=keep)
        if room_s
        else None,
    )


def _turns(
    turns: Sequence[SpokenTurn], start_s: float, duration_s: float, *, keep: bool
) -> tuple[SpokenTurn, ...]:
    """The turns in a stretch, from its start: those that overlap it, or lie in it (`keep`: no)."""
    tests = (_overlaps, _lies_in)
    return tuple(
        turn for turn in _shifted(turns, -start_s) if tests[0 if keep else 1](turn, duration_s)
    )


def _shifted(turns: Sequence[SpokenTurn], by_s: float) -> tuple[SpokenTurn, ...]:
    return tuple(replace(t, start_s=t.start_s + by_s, end_s=t.end_s + by_s) for t in turns)


def _overlaps(turn: SpokenTurn, duration_s: float) -> bool:
    touches = math.isclose(turn.start_s, duration_s) or math.isclose(turn.end_s, 0, abs_tol=_SAME)
    return turn.start_s < duration_s and turn.end_s > 0 and not touches


def _lies_in(turn: SpokenTurn, duration_s: float) -> bool:
    return turn.start_s >= -_TOLERANCE_S and turn.end_s <= duration_s + _TOLERANCE_S


def _padded(conversation: DuplexConversation, config: AugmentationConfig) -> DuplexConversation:
    least_s, direction = config.pad_min_duration, config.pad_direction
    if least_s is None or conversation.duration_s >= least_s:
        return conversation
    silence_s = least_s - conversation.duration_s
    before_s = SHARES_BEFORE.get(direction, 0.0) * silence_s
    drawn = conversation.placement
    if direction == "random":
        drawn = replace(drawn or Placement(), silence_s=silence_s)
    return replace(
        conversation,
        duration_s=least_s,
        source=padded(conversation.source, least_s, direction),
        target=padded(conversation.target, least_s, direction),
        turns=_shifted(conversation.turns, before_s),
        placement=drawn,
    )
