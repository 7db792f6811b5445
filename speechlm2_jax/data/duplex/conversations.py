"""Conversations of a user and an agent, before any tokenizer: recordings and timed turns."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.data.conversations import AudioClip

_TIMESTAMP = re.compile(r"<\|\d+\|>")


@dataclass(frozen=True, kw_only=True)
class SpokenTurn:
    """One turn of one speaker; times are seconds from the start of the conversation."""

    speaker: str | None
    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, kw_only=True)
class DialogEvent:
    """What an evaluation looks at; times are seconds from the start of the conversation."""

    kind: str
    """pause (within the user's turn), back_channel (of the user) or interruption (by the user)."""
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What augmentation draws of the times of a conversation: a share, from 0 to 1, of both."""

    room_s: float = 0.0
    """By which the start is moved."""
    stretch_s: float = 0.0
    """What is left from there on."""
    keeps_turns: bool = True
    """Whether a turn that reaches beyond the stretch stays."""
    silence_s: float = 0.0
    """Of which the share goes before the conversation."""


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
    """Of both speakers, in the order of the manifest. Where two overlap, the later one wins."""
    events: tuple[DialogEvent, ...] = ()
    """What the manifest tells of pauses and the like."""
    where: str = ""
    """The manifest and the line that it was read from, for messages."""
    shard: int = 0
    """The shard of its source that it was read from, counted from 0."""
    is_meant_silent: bool = False
    """Whether the agent is to have no text."""
    system_prompt: str = ""
    """What precedes it, for a speech-to-text model."""
    task: str = ""
    """What the manifest names it; `asr`: its agent is not scored, for a speech-to-text model."""
    placement: Placement | None = None
    """What is drawn of its times in each epoch; its turns are those before."""

    @property
    def clip_durations_s(self) -> tuple[float, ...]:
        """Seconds, of both recordings, which lie alongside."""
        return (self.duration_s,)

    def turns_of(self, roles: frozenset[str]) -> list[SpokenTurn]:
        """The turns of these speakers, in order, with cleaned texts."""
        chosen = (turn for turn in self.turns if turn.speaker in roles)
        return [replace(turn, text=clean_text(turn.text)) for turn in chosen]


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """Frames of a whole number of samples each, as NeMo counts them."""

    frame_length_s: float
    sample_rate_hz: int

    def frame(self, seconds: float) -> int:
        """The frame of a time, and how many frames a duration has: the nearest, halves up."""
        return (round(seconds * self.sample_rate_hz) + self.hop_samples // 2) // self.hop_samples

    def frames(self, seconds: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The frames of many durations."""
        samples = np.rint(seconds * self.sample_rate_hz).astype(np.int64)
        return (samples + self.hop_samples // 2) // self.hop_samples

    @property
    def hop_samples(self) -> int:
        """Samples of a frame."""
        return round(self.frame_length_s * self.sample_rate_hz)


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

    A turn is `bos` and its text from the frame of its start on, and `eos` in the frame of its end.
    Tokens outside the channel are dropped, and a later turn overwrites an earlier one.
    """
    channel = np.full(frames, ids.pad, np.int32)
    for turn in turns:
        start, end = grid.frame(turn.start_s), grid.frame(turn.end_s)
        if start > frames:
            continue
        tokens = [ids.bos, *text_to_ids(turn.text)][max(-start, 0) :]
        start = max(start, 0)
        tokens = tokens[: frames - start]
        channel[start : start + len(tokens)] = tokens
        if 0 <= end < frames:
            channel[end] = ids.eos
    return channel


def clean_text(text: str) -> str:
    """Removes timestamps such as `<|12|>`, and makes every run of white space one space."""
    return " ".join(_TIMESTAMP.sub("", text).split())
