"""Counts the tokens of texts word by word: each word is encoded once, and its count remembered.

Most byte-level tokenizers cut a text before each space that follows another character, whatever is
around it. Then the tokens of a text are those of its words, and of the tokens that are never split.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

LONGEST_WORD = 64
"""Characters of a word, or of a part without a usual space, that is remembered."""
MOST_WORDS = 1 << 17
"""Words that are remembered; all are forgotten when there are more."""
_OPEN, _WANTED = 1 << 40, 1 << 50
"""Added to the count of a word: it ends in white space, or is none; it has the wanted id."""
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPLITS = frozenset(
    f"{_CONTRACTION}|{_LETTERS}|{digits}|{_MARKS}|{_END}" for digits in (r"\p{N}", r"\p{N}{1,3}")
)
"""Patterns of Qwen and Llama 3, of which no match goes on from another character to a space, and no
match looks back."""


class TokenCount(NamedTuple):
    """What is counted of a text."""

    tokens: int
    found: int
    """Tokens of the wanted id."""
    place: int
    """The first token with a character of the span; the number of tokens without any."""


Span = tuple[int, int]
Encode = Callable[[Sequence[str]], list[list[int]]]
EncodeWithPlaces = Callable[[Sequence[str], Sequence[Span]], list[tuple[list[int], int]]]


def has_separate_words(backend: Any) -> bool:
    """Whether a Tokenizer of the package tokenizers encodes words apart.

    The argument: all that it does before the model cuts the text before such a space, or leaves
    that to the next step; and the model sees each piece alone.
    """
    added = backend.get_added_tokens_decoder().values()
    if any(one.lstrip or one.rstrip or one.single_word or one.normalized for one in added):
        return False
    if backend.normalizer is not None and _as_json(backend.normalizer) != {"type": "NFC"}:
        return False
    if backend.pre_tokenizer is None or getattr(backend.model, "dropout", None) is not None:
        return False
    step = _as_json(backend.pre_tokenizer)
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    while steps and steps[0]["type"] == "Digits":  # a space is like the letters around it
        steps = steps[1:]
    return bool(steps) and _cuts_before_spaces(steps[0])


def _cuts_before_spaces(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":  # with GPT-2's pattern
        return bool(step["use_regex"])
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in SPLITS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _as_json(step: Any) -> Any:
    return json.loads(step.__getstate__())


class WordCounter:
    """Counts the tokens of texts.

    Args:
        encode: ids of texts, encoded as a whole.
        encode_with_places: the same, with the first token of a span.
        added: the tokens that are never split, and their ids.
        wanted: an id that is counted.
    """

    def __init__(
        self,
        encode: Encode,
        encode_with_places: EncodeWithPlaces,
        added: Mapping[str, int],
        wanted: int,
    ) -> None:
        self._encode, self._encode_with_places = encode, encode_with_places
        self._added, self._wanted = dict(added), wanted
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        # without any token it matches nowhere
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split
        self._first: dict[str, int] = {}
        self._after: dict[str, int] = {}
        self._parts: dict[str, tuple[int, int]] = {}
        self._places: dict[tuple[str, int, int], int] = {}
        self._forget()

    def count(self, texts: Sequence[str], spans: Sequence[Span]) -> list[TokenCount]:
        """The counts of texts, each with a span of characters [begin, end)."""
        cut = [self._cut(text) for text in texts]
        self._learn(part for parts in cut for part in parts[::2])
        counted = [self._count(*pair) for pair in zip(cut, spans, strict=True)]
        rest = [n for n, one in enumerate(counted) if one is None]
        if rest:
            encoded = self._encode_with_places([texts[n] for n in rest], [spans[n] for n in rest])
            for n, (ids, place) in zip(rest, encoded, strict=True):
                counted[n] = TokenCount(len(ids), ids.count(self._wanted), place)
        return [one for one in counted if one is not None]

    def _learn(self, parts: Iterable[str]) -> None:
        """Encodes the words, and the short parts, that are not known."""
        if len(self._after) + len(self._first) + len(self._parts) > MOST_WORDS:
            self._forget()
        first, after, short = set[str](), set[str](), list[str]()
        for part in set(parts) - self._parts.keys():
            word, *words = part.split(" ")
            first.add(word)
            after.update(words)
            if len(part) <= LONGEST_WORD:
                short.append(part)
        self._learn_words(first, self._first, "")
        self._learn_words(after, self._after, " ")
        by_words = {part: self._of_words(part) for part in short}
        new = [part for part, own in by_words.items() if own is None]
        for part, ids in zip(new, self._encode(new) if new else (), strict=True):
            by_words[part] = len(ids), ids.count(self._wanted)
        self._parts |= {part: own for part, own in by_words.items() if own is not None}

    def _forget(self) -> None:
        """Begins again with the tokens that are never split."""
        self._first.clear()
        self._after.clear()
        self._places.clear()
        self._parts = {t: (1, int(n == self._wanted)) for t, n in self._added.items()}

    def _learn_words(self, words: set[str], known: dict[str, int], before: str) -> None:
        new = [word for word in words - known.keys() if len(word) <= LONGEST_WORD]
        ids_of = self._encode([before + word for word in new]) if new else ()
        for word, ids in zip(new, ids_of, strict=True):
            is_open = word[-1:].isspace() or (not word and bool(before))
            known[word] = len(ids) + is_open * _OPEN + (self._wanted in ids) * _WANTED

    def _of_words(self, part: str) -> tuple[int, int] | None:
        """The tokens of a part, and those of the wanted id (0); None: not known by its words."""
        word, *words = part.split(" ")
        try:
            total = self._first[word] + sum(map(self._after.__getitem__, words))
        except KeyError:  # of a long word
            return None
        if total < _OPEN:
            return total, 0
        last = self._after[words[-1]] if words else self._first[word]
        # only the last word may end in white space
        return (total - _OPEN, 0) if total < 2 * _OPEN <= 2 * last else None

    def _count(self, parts: Sequence[str], span: Span) -> TokenCount | None:
        """The counts of a text that is cut; None: not known."""
        tokens = found = start = 0
        place: int | None = None
        begin, end = span
        for number, part in enumerate(parts):
            own = self._parts.get(part) or self._of_words(part)
            if own is None:
                return None
            if place is None and begin < start + len(part):
                before = 0 if number % 2 else self._before(part, begin - start, end - start)
                if before is None or begin >= end:
                    return None
                place = tokens + before
            tokens, found, start = tokens + own[0], found + own[1], start + len(part)
        return TokenCount(tokens, found, tokens if place is None else place)

    def _before(self, part: str, begin: int, end: int) -> int | None:
        """Tokens of a part before the first one with a character of a span; None: not known."""
        if self._of_words(part) is None:
            return self._place(part, begin, end)
        words = part[: begin + 1].count(" ")
        start = part.rfind(" ", 0, begin + 1) if words else 0
        stop = part.find(" ", begin + 1)
        piece = part[start : len(part) if stop < 0 else stop]
        inside = self._place(piece, begin - start, end - start)
        if inside is None or not words:
            return inside
        before = self._of_words(part[:start])
        return None if before is None else before[0] + inside

    def _place(self, piece: str, begin: int, end: int) -> int | None:
        """The first token of a short text with a character of a span; None without any."""
        key = (piece, max(begin, 0), min(end, len(piece)))
        if (place := self._places.get(key)) is None:
            ((ids, place),) = self._encode_with_places([piece], [key[1:]])
            if place == len(ids):
                return None
            if len(piece) <= LONGEST_WORD and len(self._places) < MOST_WORDS:
                self._places[key] = place
        return place
