"""Formats whose answers may open with a thought: `<think>...</think>`, then what is said.

Dialogs are rewritten before they are rendered, as NeMo's formatters of the same names do: thoughts
of earlier answers are left out, and a last answer without one gets an empty one.
"""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

OUTPUT_ROLE = "assistant"
"""Whose turns the model learns to say."""
_OPEN, _CLOSE = "<think>", "</think>"


class Message(NamedTuple):
    """A turn of one text."""

    role: str
    text: str


class ThoughtError(ValueError):
    """A dialog whose thoughts are not written as the format wants them."""


class Thinking(ABC):
    """How one format writes thoughts."""

    OPENING: str
    """What an answer opens with, where the model may think."""
    EMPTY: str
    """What it opens with, where it may not: a thought already over."""

    @abstractmethod
    def rewrite(self, messages: Sequence[Message]) -> list[Message]:
        """Gives the turns as the format writes them; raises ThoughtError for broken thoughts."""

    def opening(self, enabled: bool) -> str:
        """What an answer opens with after its markup."""
        return self.OPENING if enabled else self.EMPTY

    def is_thoughtful(self, answer: str) -> bool:
        """Whether a rewritten answer holds a thought that is not empty."""
        return bool(answer.partition(_OPEN)[2].partition(_CLOSE)[0].strip())


def draw_of(messages: Sequence[Message]) -> random.Random:
    """What a dialog draws from: its own text, so that every process and every resume agree."""
    text = "\0".join(part for message in messages for part in message)
    return random.Random(zlib.crc32(text.encode()))


class Qwen3Thinking(Thinking):
    """Qwen3: a user or system turn also says `/think` or `/no_think`, where and whether is drawn.

    NeMo draws from Python's global generator; see `draw_of` for what is drawn from here.
    """

    OPENING = ""
    EMPTY = "<think>\n\n</think>\n\n"

    def rewrite(self, messages: Sequence[Message]) -> list[Message]:
        """Leaves old thoughts out, writes the last one in Qwen3's way and marks one turn."""
        turns = [
            Message(role, text.split(_CLOSE)[1].strip())
            if role == OUTPUT_ROLE and _CLOSE in text
            else Message(role, text)
            for role, text in messages[:-1]
        ] + [messages[-1]]
        if turns[-1].role == OUTPUT_ROLE:
            thought, answer = _parts(turns[-1].text)
            turns[-1] = Message(OUTPUT_ROLE, f"<think>\n{thought}\n</think>\n\n{answer}")
            draw = draw_of(messages)
            if not thought:
                _say("/no_think", turns, draw)
            elif draw.random() < 0.5:
                _say("/think", turns, draw)
        is_silent = turns[0].role == "system" and not turns[0].text.strip()
        return turns[1:] if is_silent else turns


class NanoThinking(Thinking):
    """Nemotron Nano v3: a system turn opens every dialog, and old answers have empty thoughts."""

    OPENING = "<think>\n"
    EMPTY = "<think></think>"

    def rewrite(self, messages: Sequence[Message]) -> list[Message]:
        """Adds the system turn and the empty thoughts."""
        turns = list(messages)
        if turns[0].role != "system":
            turns.insert(0, Message("system", ""))
        asked = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=0)
        for index, (role, text) in enumerate(turns):
            if role != OUTPUT_ROLE:
                continue
            if index < asked:
                text = self._without_thought(text)
            elif index == len(turns) - 1 and _OPEN not in text:
                text = self.EMPTY + text.strip()
            turns[index] = Message(role, text.strip())
        return turns

    def _without_thought(self, text: str) -> str:
        if _OPEN in text and _CLOSE in text:
            return self.EMPTY + text.split(_CLOSE, 1)[1].strip()
        return text if _OPEN in text or _CLOSE in text else self.EMPTY + text


def _parts(answer: str) -> tuple[str, str]:
    """Thought and answer; the thought is empty where there is none."""
    if _OPEN not in answer and _CLOSE not in answer:
        return "", answer
    if not answer.startswith(_OPEN) or _CLOSE not in answer:
        raise ThoughtError(
            f"an answer with a thought must be {_OPEN}...{_CLOSE}..., got {answer!r}"
        )
    thought, _, rest = answer.removeprefix(_OPEN).partition(_CLOSE)
    return thought.strip(), rest.split(_CLOSE)[0].lstrip("\n")


def _say(word: str, turns: list[Message], draw: random.Random) -> None:
    """Puts a word in front of or behind one of the turns that are not the model's."""
    places = [index for index, turn in enumerate(turns) if turn.role != OUTPUT_ROLE]
    if not places:
        raise ThoughtError(f"a dialog needs a user or a system turn in which {word} is said")
    index = draw.choice(places)
    role, text = turns[index]
    turns[index] = Message(role, f"{text} {word}" if draw.random() < 0.5 else f"{word} {text}")
