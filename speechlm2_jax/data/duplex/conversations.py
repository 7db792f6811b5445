"""Conversations of two voices, before any tokenizer: who is heard, and who says what when."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.conversations import AudioClip

_TIMESTAMP = re.compile(r"<\|\d+\|>")


@dataclass(frozen=True, kw_only=True)
class SpokenTurn:
    """What one speaker says in one go; times are seconds from the start of the conversation."""

    speaker: str | None
    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, kw_only=True)
class DuplexConversation:
    """The user's recording and the agent's, side by side in time."""

    id: str
    duration_s: float
    sample_rate_hz: int
    """Of the user's recording."""
    source: AudioClip
    """The user."""
    target: AudioClip
    """The agent."""
    turns: tuple[SpokenTurn, ...]
    """By either, in the order of their manifest: where two overlap, the later one is heard."""
    where: str = ""
    """The manifest and the line that it was read from, for messages."""
    shard: int = 0
    """The shard of its source that it was read from, counted from 0."""

    def by(self, roles: frozenset[str]) -> list[SpokenTurn]:
        """The turns of some speakers, in order, their texts cleaned."""
        spoken = (turn for turn in self.turns if turn.speaker in roles)
        return [replace(turn, text=clean_text(turn.text)) for turn in spoken]


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """Frames of a whole number of samples each, as NeMo counts them."""

    frame_length_s: float
    sample_rate_hz: int

    def frame(self, seconds: float) -> int:
        """The frame of a time, and how many frames a duration has: the nearest, halves up."""
        hop = round(self.frame_length_s * self.sample_rate_hz)
        return (round(seconds * self.sample_rate_hz) + hop // 2) // hop


@dataclass(frozen=True, kw_only=True)
class ChannelIds:
    """Ids that a text channel is written with, beside those of the text."""

    bos: int
    eos: int
    pad: int


def text_channel(
    turns: Sequence[SpokenTurn],
    frames: int,
    *,
    grid: FrameGrid,
    text_to_ids: Callable[[str], list[int]],
    ids: ChannelIds,
) -> Int[np.ndarray, " T"]:
    """Writes turns into a channel of one token per frame, padding wherever nobody has a token.

    A turn is `bos` and its text from the frame of its start on, as far as the channel reaches,
    and `eos` in the frame of its end, if that is inside; a later turn overwrites an earlier one. Of
    a turn that began before the conversation only what falls inside is written.
    """
    channel = np.full(frames, ids.pad, np.int32)
    for turn in turns:
        start, end = grid.frame(turn.start_s), grid.frame(turn.end_s)
        if start > frames:
            continue
        spoken = [ids.bos, *text_to_ids(turn.text)][max(-start, 0) :]
        start = max(start, 0)
        spoken = spoken[: frames - start]
        channel[start : start + len(spoken)] = spoken
        if 0 <= end < frames:
            channel[end] = ids.eos
    return channel


def clean_text(text: str) -> str:
    """Removes timestamps such as `<|12|>`, and makes every run of white space one space."""
    return " ".join(_TIMESTAMP.sub("", text).split())
