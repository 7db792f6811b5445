"""Texts of chunks that overlap, joined where both say the same words.

The end of one text is aligned with the beginning of the next by the fewest errors, a shared word
counting for the alignment and the number of words that the overlap should hold, by its share of
the speech, deciding where words are repeated. The texts change over at the shared word nearest
the middle: there both chunks heard what comes before and after, at their edges they did not.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from speechlm2_jax.inference.long_form.chunks import Chunk

SUBSTITUTION = -1.0
GAP = -1.6
"""More than half a word worse than a substitution: else a word that is said again and again would
be shifted over the broken words at the edges."""
UNEXPECTED = 1.1
"""Per word more or fewer than an overlap should hold: more than the word itself counts."""
MORE_WORDS = 8
"""Words looked at beyond twice the expected number."""
_MARKS = re.compile(r"[^\w']+")


class Overlap(NamedTuple):
    """Where two texts change over: words kept of the first, words left out of the second."""

    keep: int
    skip: int


def join(texts: Sequence[str], chunks: Sequence[Chunk]) -> str:
    """Joins the texts of a recording's chunks, in order; words are separated by white space.

    A single text is given back as it is.
    """
    if len(texts) == 1:
        return texts[0]
    words: list[str] = []
    last: list[str] = []
    share = 0.0
    for text, chunk in zip(texts, chunks, strict=True):
        own = text.split()
        tail = words[max(len(words) - len(last), 0) :]
        keep, skip = find_overlap(tail, own, (share * len(last), chunk.before * len(own)))
        words = words[: len(words) - len(tail) + keep] + own[skip:]
        last, share = own, chunk.after
    return " ".join(words)


def find_overlap(
    first: Sequence[str], second: Sequence[str], expected: tuple[float, float]
) -> Overlap:
    """Finds where two texts change over.

    `expected` says how many words of the end of the first and of the beginning of the second lie
    in the overlap, as far as that is known. Case and punctuation do not matter.
    """
    most = [int(2 * count) + MORE_WORDS for count in expected]
    before = max(len(first) - most[0], 0)
    path = _path(_plain(first[before:]), _plain(second[: most[1]]), expected)
    middle = len(path) / 2
    same = [(abs(n + 0.5 - middle), n) for n, step in enumerate(path) if step.is_same]
    if same:
        step = path[min(same)[1]]
    elif path:
        step = path[(len(path) - 1) // 2]
    else:
        return Overlap(len(first), 0)
    return Overlap(before + step.first, step.second)


class _Step(NamedTuple):
    """Words of both texts that are behind after one step of an alignment."""

    first: int
    second: int
    is_same: bool


def _plain(words: Sequence[str]) -> list[str]:
    return [_MARKS.sub("", word).casefold() or word for word in words]


def _path(first: list[str], second: list[str], expected: tuple[float, float]) -> list[_Step]:
    """The best alignment of an end of `first` with a beginning of `second`, step by step."""
    same = np.array([[a == b for b in second] for a in first], bool)
    same = same.reshape(len(first), len(second))
    score, came = _fill(same, expected[0])
    ends = score[-1] - UNEXPECTED / 2 * np.abs(np.arange(len(second) + 1) - expected[1])
    i, j = len(first), int(ends.argmax())
    path = []
    while j > 0:
        both, is_gap = came[i, j] == 0, came[i, j]
        path.append(_Step(i, j, bool(both and same[i - 1, j - 1])))
        i, j = i - (is_gap != 2), j - (is_gap != 1)
    return path[::-1]


def _fill(same: np.ndarray, expected: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the best alignments up to each pair of words, and the step that each came by.

    Steps: 0 takes a word of both, 1 of the first text, 2 of the second. An alignment may begin
    at any word of the first text, for the price of being far from the expected one.
    """
    rows, columns = same.shape
    score = np.full((rows + 1, columns + 1), -np.inf)
    came = np.zeros((rows + 1, columns + 1), np.int8)
    score[:, 0] = -UNEXPECTED / 2 * np.abs(rows - np.arange(rows + 1) - expected)
    score[0, 1:], came[0, 1:] = score[0, 0] + GAP * np.arange(1, columns + 1), 2
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            ways = (
                score[i - 1, j - 1] + (1.0 if same[i - 1, j - 1] else SUBSTITUTION),
                score[i - 1, j] + GAP,
                score[i, j - 1] + GAP,
            )
            came[i, j] = max(range(3), key=ways.__getitem__)
            score[i, j] = ways[came[i, j]]
    return score, came
