"""Spelling of what a recogniser heard: punctuation sticks to the word before it."""

import re
import unicodedata
from collections.abc import Iterable

_NO_TEXT = re.compile(r"\[.*\]$|<.*>$|##|▁|\s*$")
"""Pieces whose marks do not count: special tokens, starts of words, white space."""


def punctuation_marks(pieces: Iterable[str]) -> frozenset[str]:
    """The punctuation marks that pieces of a SentencePiece vocabulary spell, as NeMo finds them."""
    return frozenset(
        mark
        for piece in pieces
        if not _NO_TEXT.match(piece)
        for mark in piece
        if unicodedata.category(mark).startswith("P")
    )


def attach_punctuation(text: str, marks: Iterable[str]) -> str:
    """Drops one space before each of the marks; a second one would be the recogniser's doing."""
    choice = "|".join(re.escape(mark) for mark in sorted(marks))
    return re.sub(rf"\s({choice})", r"\1", text) if choice else text
