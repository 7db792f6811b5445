"""Turns of a text channel, with the start time of each word."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speechlm2_jax.arrays import ArrayLike

Detokenize = Callable[[list[int]], str]
"""Token ids -> text."""


@dataclass(frozen=True, kw_only=True)
class SpokenWord:
    """A word and the time of its first token."""

    start_s: float
    text: str


@dataclass(frozen=True, kw_only=True)
class TranscribedTurn:
    """One turn of one side; times are seconds from the start of the conversation."""

    start_s: float
    end_s: float
    words: tuple[SpokenWord, ...] = ()
    is_marked: bool = True
    """Whether it starts with a bos token; text between turns does not."""

    @property
    def text(self) -> str:
        """Its words as one string."""
        return " ".join(word.text for word in self.words)

    def plain(self) -> dict[str, Any]:
        """Its entry in a row of answers.jsonl."""
        times = {"start": round(self.start_s, 3), "end": round(self.end_s, 3)}
        return {**times, "text": self.text, **({} if self.is_marked else {"outside": True})}


@dataclass
class _OpenTurn:
    """A turn that has no end yet."""

    start: int
    is_marked: bool
    ids: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)


def text_turns(
    tokens: ArrayLike,
    detokenize: Detokenize,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    frame_s: float,
    first_frame: int = 0,
) -> list[TranscribedTurn]:
    """Splits a text channel [T], one token per frame, into turns.

    A turn goes from bos to eos, to the next bos, or to the end of the channel. Tokens between turns
    make unmarked turns, which end with their last token. `first_frame` is as in
    `Turns.from_tokens`.
    """
    channel = np.asarray(tokens).tolist()
    turns: list[TranscribedTurn] = []
    turn: _OpenTurn | None = None

    def close(frame: int) -> None:
        if turn is not None:
            end = frame if turn.is_marked else turn.frames[-1] + 1
            turns.append(
                TranscribedTurn(
                    start_s=(turn.start + first_frame) * frame_s,
                    end_s=(end + first_frame) * frame_s,
                    words=_words(turn.ids, turn.frames, detokenize, frame_s, first_frame),
                    is_marked=turn.is_marked,
                )
            )

    for frame, token in enumerate(channel):
        if token in (bos_id, eos_id):
            close(frame)
            turn = _OpenTurn(start=frame, is_marked=True) if token == bos_id else None
        elif token != pad_id:
            turn = turn or _OpenTurn(start=frame, is_marked=False)
            turn.ids.append(token)
            turn.frames.append(frame)
    close(len(channel))
    return turns


def _words(
    ids: Sequence[int],
    frames: Sequence[int],
    detokenize: Detokenize,
    frame_s: float,
    first_frame: int,
) -> tuple[SpokenWord, ...]:
    """The words with their start times.

    Word n starts at the first frame at which the detokenized text has n words.
    """
    starts: list[int] = []
    texts: list[str] = []
    for count, frame in enumerate(frames, 1):
        texts = detokenize(list(ids[:count])).split()
        starts = [*starts[: len(texts)], *[frame] * (len(texts) - len(starts))]
    return tuple(
        SpokenWord(start_s=(start + first_frame) * frame_s, text=text)
        for start, text in zip(starts, texts, strict=True)
    )
