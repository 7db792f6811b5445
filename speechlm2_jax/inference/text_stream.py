"""Answers that are reported while they grow: pieces of text, and texts that end them."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

Decode = Callable[[Any], str]
"""Ids of one row -> their text."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token of one byte: what a run of them means is known at its end only."""
UNDECIDED = "\ufffd"
"""What decoding gives for bytes that are no whole character yet."""


@dataclass(frozen=True)
class PartialOutput:
    """Answers as far as they are known, in the order of the prompts, those to one side by side."""

    ids: np.ndarray
    """Int32 [N, A], padded after each row's length."""
    lengths: np.ndarray
    ended: np.ndarray
    """Bool [N]: rows of which nothing more will come."""
    scores: np.ndarray | None = None

    def trimmed(self) -> np.ndarray:
        """Ids up to the end of the longest row."""
        return self.ids[:, : self.lengths.max(initial=0)]


class Piece(NamedTuple):
    """What came of one row since its last piece."""

    row: int
    """Index of the prompt; with `num_return_sequences` N, of its answer a: N x prompt + a."""
    text: str
    """Empty where the new tokens make no whole character yet."""
    ids: np.ndarray
    """Int32: the new tokens."""
    is_last: bool


def last_of(reports: Iterator[PartialOutput]) -> PartialOutput:
    """The last report; there always is one."""
    *_, last = reports
    return last


@runtime_checkable
class TextTokenizer(Protocol):
    """What turns ids into text."""

    def ids_to_text(self, ids: Any) -> str:
        """Decodes one row."""
        ...

    def ids_to_tokens(self, ids: Any) -> list[str]:
        """The token string of each id."""
        ...


def pieces(reports: Iterator[PartialOutput], tokenizer: TextTokenizer) -> Iterator[Piece]:
    """What is new in each report, row by row. Only text that will not change is given."""
    sent: dict[int, tuple[int, str]] = {}
    closed: set[int] = set()
    spoken = None

    def piece(row: int, is_last: bool) -> Piece:
        assert spoken is not None
        count, before = sent.get(row, (0, ""))
        length = int(spoken.lengths[row])
        ids = spoken.ids[row, :length]
        text = tokenizer.ids_to_text(ids) if is_last else _decided(ids, tokenizer)
        text = text if text.startswith(before) else before
        sent[row] = (length, text)
        return Piece(row, text[len(before) :], spoken.ids[row, count:length], is_last)

    for spoken in reports:
        for row, is_last in enumerate(spoken.ended):
            if row not in closed:
                yield piece(row, bool(is_last))
            if is_last:
                closed.add(row)
    for row in range(0 if spoken is None else len(spoken.ended)):
        if row not in closed:  # stopped from outside
            yield piece(row, True)


def cut_at(
    reports: Iterator[PartialOutput], strings: Sequence[str], decode: Decode, pad_id: int
) -> Iterator[PartialOutput]:
    """Ends each row with the first token that completes one of `strings` in its text."""
    ends: dict[int, int] = {}
    for spoken in reports:
        ids, lengths = spoken.ids.copy(), spoken.lengths.copy()
        for row, length in enumerate(spoken.lengths):
            end = ends.get(row) or _end(ids[row, :length], strings, decode)
            if end is not None:
                ends[row] = lengths[row] = end
                ids[row, end:] = pad_id
        ended = spoken.ended | np.isin(np.arange(len(ids)), list(ends))
        yield replace(spoken, ids=ids, lengths=lengths, ended=ended)
        if ended.all():
            return


def _decided(ids: np.ndarray, tokenizer: TextTokenizer) -> str:
    """The text that no further token will change."""
    count = len(ids)
    while count and BYTE.fullmatch(tokenizer.ids_to_tokens(ids[count - 1 : count])[0]):
        count -= 1
    return tokenizer.ids_to_text(ids[:count]).rstrip(UNDECIDED)


def _end(ids: np.ndarray, strings: Sequence[str], decode: Decode) -> int | None:
    """How many tokens it takes to say one of the strings."""

    def says(count: int) -> bool:
        text = decode(ids[:count])
        return any(string in text for string in strings)

    if not says(len(ids)):
        return None
    return next(n for n in range(1, len(ids) + 1) if says(n))
