"""Words as they are written -> labels of an ASR model, for forced alignment.

A transcript has case, punctuation and digits that an ASR model may not know. What it does not know
is replaced by what it knows (case, accents) or left out; each word keeps its place.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from speechlm2_jax.conversion.readers.nemo import NemoArchive
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.pretrained.asr_labels import (
    CHARACTER_MODELS,
    CONTINUATION,
    character_labels,
    class_name,
    has_word_pieces,
    word_pieces,
)
from speechlm2_jax.pretrained.locate import nemo_tokenizer

APOSTROPHES = "'\u2019\u02bc\uff07"
"""Kept within words. Other marks separate the parts of a word, as in well-known."""
WORD_START = "\u2581"
"""SentencePiece's mark of a space."""
DIGIT_LETTERS = 4
"""A digit that is spoken takes about as long as so many letters: nine, seven."""

_SPECIAL = re.compile(r"\[.+\]$|<.+>$")
"""Pieces that are no text: <unk>, [UNK], bytes as <0x0A>."""


class WordLabels(NamedTuple):
    """The labels of one word, and how many letters each stands for."""

    labels: tuple[int, ...]
    """Empty for a word of which the ASR model knows nothing."""
    letters: tuple[int, ...]
    length: int
    """Letters of the whole word; a digit counts as DIGIT_LETTERS."""


class LabelEncoder:
    """Turns the words of a text into labels.

    `encode` gives the labels of one lower-level word each, as the pieces of the ASR model; unknown
    ones are below 0. `space` is the label between two words, if the model has one.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        encode: Callable[[Sequence[str]], list[list[int]]],
        space: int | None = None,
    ) -> None:
        self.space = space
        self._encode = encode
        self._pieces = tuple(pieces)
        self._has_starts = any(piece.startswith(WORD_START) for piece in pieces)
        self._letters = [_letters(piece) for piece in pieces]
        self._known = frozenset(c for p in pieces if not _is_special(p) for c in _plain(p))

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, pieces: int) -> "LabelEncoder":
        """Uses the first `pieces` tokens of a tokenizer."""
        unknown = tokenizer.unk_id

        def encode(words: Sequence[str]) -> list[list[int]]:
            found = tokenizer.texts_to_ids(words)
            return [[-1 if i == unknown or i >= pieces else i for i in ids] for ids in found]

        return cls(tokenizer.ids_to_tokens(range(pieces)), encode)

    @classmethod
    def from_characters(cls, labels: Sequence[str]) -> "LabelEncoder":
        """Every character is a label, the space too."""
        index = {label: number for number, label in enumerate(labels)}

        def encode(words: Sequence[str]) -> list[list[int]]:
            return [[index.get(c, -1) for c in word] for word in words]

        return cls(labels, encode, space=index.get(" "))

    @classmethod
    def from_word_pieces(cls, pieces: Sequence[str]) -> "LabelEncoder":
        """Takes the longest piece that fits at each place, as BERT's tokenizer."""
        index = {piece: number for number, piece in enumerate(pieces)}

        def encode(words: Sequence[str]) -> list[list[int]]:
            return [list(_longest_pieces(word, index)) for word in words]

        return cls(pieces, encode)

    def __call__(self, words: Sequence[str]) -> list[WordLabels]:
        """The labels of each word."""
        parts = [self._parts(word) for word in words]
        distinct = list(dict.fromkeys(part for own in parts for part in own))
        found = dict(zip(distinct, self._encode(distinct), strict=True)) if distinct else {}
        return [
            self._labels(word, [found[part] for part in own])
            for word, own in zip(words, parts, strict=True)
        ]

    def letters(self, labels: Sequence[int]) -> list[str]:
        """The letters of each label of a transcript, in lower case; marks have none."""
        return [plain_letters(_plain(self._pieces[i])) for i in labels]

    def word_numbers(self, labels: Sequence[int]) -> list[int]:
        """For each label of a transcript, the number of its word there, from 0 or 1 on."""
        number, numbers = 0, list[int]()
        for label in labels:
            number += self._starts_word(label)
            numbers.append(number)
        return numbers

    def _starts_word(self, label: int) -> bool:
        piece = self._pieces[label]
        if self._has_starts:
            return piece.startswith(WORD_START)
        if self.space is not None:
            return label == self.space
        return not piece.startswith(CONTINUATION)

    def _labels(self, word: str, parts: Sequence[Sequence[int]]) -> WordLabels:
        labels = [i for n, part in enumerate(parts) for i in (*self._between(n), *part)]
        labels = [i for i in labels if i >= 0]
        if not any(self._letters[i] for i in labels):  # a mark of a space alone
            labels = []
        letters = sum(DIGIT_LETTERS if c.isdigit() else c.isalnum() for c in word)
        return WordLabels(tuple(labels), tuple(self._letters[i] for i in labels), letters)

    def _between(self, number: int) -> tuple[int, ...]:
        """The label before part `number` of a word."""
        return (self.space,) if number and self.space is not None else ()

    def _parts(self, word: str) -> list[str]:
        """The parts of a word between marks, in characters that the model knows."""
        text = "".join(self._known_form(c) for c in unicodedata.normalize("NFKC", word))
        return text.split()

    def _known_form(self, character: str) -> str:
        """A character as the model knows it: itself, in another case or without its accent.

        Marks become spaces, and letters and digits that it does not know nothing.
        """
        if character in APOSTROPHES:
            return "'" if "'" in self._known else ""
        if not character.isalnum() and not unicodedata.combining(character):
            return " "
        plain = unicodedata.normalize("NFD", character)[0]
        forms = (character, character.lower(), character.upper(), plain, plain.lower())
        return next((form for form in forms if form and set(form) <= self._known), "")


def nemo_label_encoder(archive: NemoArchive, decoder: str) -> LabelEncoder:
    """The label encoder of an ASR model's `decoder` ("rnnt" or "ctc").

    Raises SettingsError for an archive without labels, or with an unsupported tokenizer.
    """
    if class_name(archive) in CHARACTER_MODELS:
        return LabelEncoder.from_characters(character_labels(archive, decoder))
    if has_word_pieces(archive):
        return LabelEncoder.from_word_pieces(word_pieces(archive))
    found = nemo_tokenizer(archive)
    return LabelEncoder.from_tokenizer(found, len(found))


def plain_letters(text: str) -> str:
    """The letters and digits of a text, in lower case and without accents."""
    parts = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in parts if c.isalnum())


def _is_special(piece: str) -> bool:
    return bool(_SPECIAL.match(piece))


def _plain(piece: str) -> str:
    """A piece without what marks the start or the middle of a word."""
    return piece.removeprefix(CONTINUATION).replace(WORD_START, "")


def _letters(piece: str) -> int:
    return 0 if _is_special(piece) else sum(c.isalnum() for c in _plain(piece))


def _longest_pieces(word: str, index: dict[str, int]) -> Iterable[int]:
    start = 0
    while start < len(word):
        prefix = CONTINUATION if start else ""
        ends = range(len(word), start, -1)
        end = next((e for e in ends if prefix + word[start:e] in index), None)
        yield -1 if end is None else index[prefix + word[start:end]]
        start = start + 1 if end is None else end
