"""Streaming of generated text, and stop strings."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int32

from speechlm2_jax.arrays import ArrayLike

ToText = Callable[[ArrayLike], str]
"""Token ids of one sequence -> their text."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte token. Several of them form one character, which is known only after the last byte."""
UNDECIDED = "\ufffd"
"""U+FFFD, to which a tokenizer decodes incomplete UTF-8."""


@dataclass(frozen=True)
class PartialOutput:
    """The tokens generated so far, in the order of the prompts.

    With `num_return_sequences` the sequences of one prompt are adjacent.
    """

    ids: Int32[np.ndarray, "N A"]
    """Padded after each sequence's length."""
    lengths: Int32[np.ndarray, " N"]
    ended: Bool[np.ndarray, " N"]
    """True where a sequence is complete."""
    scores: Float[np.ndarray, " N"] | None = None
    drafted: Int32[np.ndarray, " N"] | None = None
    """Draft tokens that were checked; None without speculative decoding."""
    accepted: Int32[np.ndarray, " N"] | None = None
    """Draft tokens that are part of the response."""
    logprobs: Float[np.ndarray, "N A"] | None = None
    """Log-probability of each token; None if not kept."""

    def trimmed(self) -> Int32[np.ndarray, "N T"]:
        """Ids up to the end of the longest sequence."""
        return self.ids[:, : self.lengths.max(initial=0)]


class Piece(NamedTuple):
    """The new tokens and text of one sequence since its last piece."""

    row: int
    """Index of the sequence: N * p + i for sequence i of prompt p; N is `num_return_sequences`."""
    text: str
    """New text. It is empty while the new tokens form an incomplete character."""
    ids: np.ndarray
    """Int32: the new tokens."""
    is_last: bool


def last_output(outputs: Iterator[PartialOutput]) -> PartialOutput:
    """Runs generation to its end and returns the last output. There is always at least one."""
    *_, last = outputs
    return last


@runtime_checkable
class TextTokenizer(Protocol):
    """Turns ids into text."""

    def ids_to_text(self, ids: ArrayLike) -> str:
        """Decodes one sequence."""
        ...

    def ids_to_tokens(self, ids: ArrayLike) -> list[str]:
        """The token string of each id."""
        ...


class GrowingText:
    """The text of one sequence whose tokens come one after another.

    Text that was given out does not change later.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.text, self.count = "", 0
        """All text so far, and the number of tokens so far."""

    def add(self, ids: np.ndarray, is_last: bool) -> str:
        """Takes all ids [T] so far, and returns the new text."""
        before = self.text
        text = self._tokenizer.ids_to_text(ids) if is_last else _decided(ids, self._tokenizer)
        self.text, self.count = (text if text.startswith(before) else before), len(ids)
        return self.text[len(before) :]


class RunningText:
    """The text of tokens that come without end. A token's cost does not grow with their number.

    Text that was given out does not change later. Each decoding begins with the tokens of the last
    piece, for spaces between words and characters of several tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """Takes the next token and returns the new text: "" within a character."""
        self._new.append(token)
        if BYTE.fullmatch(self._tokenizer.ids_to_tokens(np.asarray([token], np.int32))[0]):
            return ""
        text = self._tokenizer.ids_to_text(self._ids())
        return "" if text.endswith(UNDECIDED) else self._piece(text)

    def finish(self) -> str:
        """Returns the text that was held back."""
        return self._piece(self._tokenizer.ids_to_text(self._ids()))

    def _ids(self) -> np.ndarray:
        return np.asarray([*self._before, *self._new], np.int32)

    def _piece(self, text: str) -> str:
        before = self._tokenizer.ids_to_text(np.asarray(self._before, np.int32))
        new = text[len(commonprefix((before, text))) :]
        if new:
            self._before, self._new = self._new, []
        return new


def stream_pieces(outputs: Iterator[PartialOutput], tokenizer: TextTokenizer) -> Iterator[Piece]:
    """Yields the new tokens and text of each output, sequence by sequence.

    Text that was yielded does not change later.
    """
    sent: defaultdict[int, GrowingText] = defaultdict(lambda: GrowingText(tokenizer))
    closed: set[int] = set()
    output = None

    def piece(row: int, is_last: bool) -> Piece:
        assert output is not None
        length, before = int(output.lengths[row]), sent[row].count
        text = sent[row].add(output.ids[row, :length], is_last)
        return Piece(row, text, output.ids[row, before:length], is_last)

    for output in outputs:
        for row, is_last in enumerate(output.ended):
            if row not in closed:
                yield piece(row, bool(is_last))
            if is_last:
                closed.add(row)
    for row in range(0 if output is None else len(output.ended)):
        if row not in closed:  # stopped by a time limit or `should_stop`
            yield piece(row, True)


def apply_stop_strings(
    outputs: Iterator[PartialOutput], strings: Sequence[str], to_text: ToText, pad_id: int
) -> Iterator[PartialOutput]:
    """Ends each sequence after the first token that completes one of `strings` in its text."""
    ends: dict[int, int] = {}
    for output in outputs:
        ids, lengths = output.ids.copy(), output.lengths.copy()
        for row, length in enumerate(output.lengths):
            end = ends.get(row) or _end(ids[row, :length], strings, to_text)
            if end is not None:
                ends[row] = lengths[row] = end
                ids[row, end:] = pad_id
        ended = output.ended | np.isin(np.arange(len(ids)), list(ends))
        yield replace(output, ids=ids, lengths=lengths, ended=ended)
        if ended.all():
            return


def _decided(ids: np.ndarray, tokenizer: TextTokenizer) -> str:
    """The text that no further token can change."""
    count = len(ids)
    while count and BYTE.fullmatch(tokenizer.ids_to_tokens(ids[count - 1 : count])[0]):
        count -= 1
    return tokenizer.ids_to_text(ids[:count]).rstrip(UNDECIDED)


def _end(ids: np.ndarray, strings: Sequence[str], to_text: ToText) -> int | None:
    """The number of tokens after which the text first contains one of `strings`; None if never."""

    def has_string(count: int) -> bool:
        text = to_text(ids[:count])
        return any(string in text for string in strings)

    if not has_string(len(ids)):
        return None
    return next(n for n in range(1, len(ids) + 1) if has_string(n))
