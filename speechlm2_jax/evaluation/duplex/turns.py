"""A text channel as a reader sees it: who said which word when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Spell = Callable[[list[int]], str]
"""Token ids -> text."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word, and the time of its first token."""

    start_s: float
    text: str


@dataclass(frozen=True, kw_only=True)
class SaidTurn:
    """What one side says in one go, in seconds from the start of the conversation."""

    start_s: float
    end_s: float
    words: tuple[Word, ...] = ()
    is_marked: bool = True
    """Whether a begin token opens it; what is said outside of all turns has none."""

    @property
    def text(self) -> str:
        """Its words."""
        return " ".join(word.text for word in self.words)

    def plain(self) -> dict[str, Any]:
        """As a row of answers.jsonl has it."""
        times = {"start": round(self.start_s, 3), "end": round(self.end_s, 3)}
        return {**times, "text": self.text, **({} if self.is_marked else {"outside": True})}


@dataclass
class _Open:
    """A turn whose end was not seen yet."""

    start: int
    is_marked: bool
    ids: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)


def said_turns(
    tokens: Any,
    spell: Spell,
    *,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    frame_s: float,
    first_frame: int = 0,
) -> list[SaidTurn]:
    """Reads a text channel [T], one token per frame; `first_frame` is as in `Turns.from_tokens`.

    A turn goes from bos to eos, or as far as it is not closed. Tokens between turns make turns of
    their own, which are not marked and end with their last token.
    """
    channel = np.asarray(tokens).tolist()
    turns: list[SaidTurn] = []
    turn: _Open | None = None

    def close(frame: int) -> None:
        if turn is not None:
            end = frame if turn.is_marked else turn.frames[-1] + 1
            turns.append(
                SaidTurn(
                    start_s=(turn.start + first_frame) * frame_s,
                    end_s=(end + first_frame) * frame_s,
                    words=_words(turn.ids, turn.frames, spell, frame_s, first_frame),
                    is_marked=turn.is_marked,
                )
            )

    for frame, token in enumerate(channel):
        if token in (bos_id, eos_id):
            close(frame)
            turn = _Open(start=frame, is_marked=True) if token == bos_id else None
        elif token != pad_id:
            turn = turn or _Open(start=frame, is_marked=False)
            turn.ids.append(token)
            turn.frames.append(frame)
    close(len(channel))
    return turns


def _words(
    ids: Sequence[int], frames: Sequence[int], spell: Spell, frame_s: float, first_frame: int
) -> tuple[Word, ...]:
    """Each word of the text, at the frame where the text so far first has so many words."""
    starts: list[int] = []
    texts: list[str] = []
    for count, frame in enumerate(frames, 1):
        texts = spell(list(ids[:count])).split()
        starts = [*starts[: len(texts)], *[frame] * (len(texts) - len(starts))]
    return tuple(
        Word(start_s=(start + first_frame) * frame_s, text=text)
        for start, text in zip(starts, texts, strict=True)
    )
