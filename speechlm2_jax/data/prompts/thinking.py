"""Formats whose responses may open with a thought: `<think>...</think>`, then the text.

Dialogs are rewritten before they are rendered, as NeMo's formatters of the same names do: thoughts
of earlier responses are left out, and a last response without a thought gets an empty one.
"""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

OUTPUT_ROLE = "assistant"
"""The role whose turns the model learns."""
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
    """Start of a response where thinking is enabled."""
    EMPTY: str
    """Start of a response where it is not: an empty, closed thought."""

    @abstractmethod
    def rewrite(self, messages: Sequence[Message]) -> list[Message]:
        """Gives the turns as the format writes them; raises ThoughtError for broken thoughts."""

    def opening(self, enabled: bool) -> str:
        """Start of a response, after its markup."""
        return self.OPENING if enabled else self.EMPTY

    def is_thoughtful(self, response: str) -> bool:
        """Whether a rewritten response has a thought that is not empty."""
        return bool(response.partition(_OPEN)[2].partition(_CLOSE)[0].strip())


def dialog_rng(messages: Sequence[Message]) -> random.Random:
    """A generator seeded with the dialog's text, so that all hosts and resumed runs agree."""
    text = "\0".join(part for message in messages for part in message)
    return random.Random(zlib.crc32(text.encode()))


class Qwen3Thinking(Thinking):
    """Qwen3: a random user or system turn gets `/think` (half of the dialogs) or `/no_think`.

    NeMo uses Python's global generator, this class `dialog_rng`.
    """

    OPENING = ""
    EMPTY = "<think>\n\n</think>\n\n"

    def rewrite(self, messages: Sequence[Message]) -> list[Message]:
        """Removes earlier thoughts, formats the last one as Qwen3 does and marks one turn."""
        turns = [
            Message(role, text.split(_CLOSE)[1].strip())
            if role == OUTPUT_ROLE and _CLOSE in text
            else Message(role, text)
            for role, text in messages[:-1]
        ] + [messages[-1]]
        if turns[-1].role == OUTPUT_ROLE:
            thought, text = _split_thought(turns[-1].text)
            turns[-1] = Message(OUTPUT_ROLE, f"<think>\n{thought}\n</think>\n\n{text}")
            rng = dialog_rng(messages)
            if not thought:
                _insert("/no_think", turns, rng)
            elif rng.random() < 0.5:
                _insert("/think", turns, rng)
        is_empty = turns[0].role == "system" and not turns[0].text.strip()
        return turns[1:] if is_empty else turns


class NanoThinking(Thinking):
    """Nemotron Nano v3: dialogs open with a system turn, earlier responses have empty thoughts."""

    OPENING = "<think>\n"
    EMPTY = "<think></think>"

    def rewrite(self, messages: Sequence[Message]) -> list[Message]:
        """Adds the system turn and the empty thoughts."""
        turns = list(messages)
        if turns[0].role != "system":
            turns.insert(0, Message("system", ""))
        last_user = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=0)
        for index, (role, text) in enumerate(turns):
            if role != OUTPUT_ROLE:
                continue
            if index < last_user:
                text = self._without_thought(text)
            elif index == len(turns) - 1 and _OPEN not in text:
                text = self.EMPTY + text.strip()
            turns[index] = Message(role, text.strip())
        return turns

    def _without_thought(self, text: str) -> str:
        if _OPEN in text and _CLOSE in text:
            return self.EMPTY + text.split(_CLOSE, 1)[1].strip()
        return text if _OPEN in text or _CLOSE in text else self.EMPTY + text


def _split_thought(response: str) -> tuple[str, str]:
    """Thought and text of a response; the thought is empty if there is none."""
    if _OPEN not in response and _CLOSE not in response:
        return "", response
    if not response.startswith(_OPEN) or _CLOSE not in response:
        raise ThoughtError(
            f"a response with a thought must be {_OPEN}...{_CLOSE}..., got {response!r}"
        )
    thought, _, rest = response.removeprefix(_OPEN).partition(_CLOSE)
    return thought.strip(), rest.split(_CLOSE)[0].lstrip("\n")


def _insert(word: str, turns: list[Message], rng: random.Random) -> None:
    """Prepends or appends a word to a random turn that is not the model's."""
    places = [index for index, turn in enumerate(turns) if turn.role != OUTPUT_ROLE]
    if not places:
        raise ThoughtError(f"a dialog needs a user or a system turn for {word}")
    index = rng.choice(places)
    role, text = turns[index]
    turns[index] = Message(role, f"{text} {word}" if rng.random() < 0.5 else f"{word} {text}")
