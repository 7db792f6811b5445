"""Joins the texts of overlapping chunks where both have the same words.

- The end of one text is aligned with the start of the next (Needleman-Wunsch): shared words score,
  substitutions and gaps cost.
- Where words repeat, several alignments score alike. The number of words that the overlap should
  hold, by its share of the speech, decides.
- The texts change over at the shared word nearest the middle of the overlap: words at the edges of
  a chunk are cut off.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from speechlm2_jax.inference.long_form.chunks import Chunk

SUBSTITUTION = -1.0
GAP = -1.6
"""More than half a word worse than a substitution. Otherwise repeated words ("no no no") would be
shifted over the cut-off words at the edges."""
UNEXPECTED = 1.1
"""Cost per word more or fewer than expected in the overlap; more than a shared word scores."""
MORE_WORDS = 8
"""Words compared beyond twice the expected number."""
_MARKS = re.compile(r"[^\w']+")


class Overlap(NamedTuple):
    """Where two texts change over."""

    keep: int
    """Words kept of the first text."""
    skip: int
    """Words left out at the start of the second text."""


def join(texts: Sequence[str], chunks: Sequence[Chunk]) -> str:
    """Joins the texts of a recording's chunks, in order; words are separated by white space.

    A single text is returned unchanged.
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
    """Finds where two texts change over; case and punctuation do not matter.

    `expected` estimates how many words at the end of the first and at the start of the second text
    lie in the overlap.
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
    """Words of both texts consumed after one step of an alignment."""

    first: int
    second: int
    is_same: bool


def _plain(words: Sequence[str]) -> list[str]:
    return [_MARKS.sub("", word).casefold() or word for word in words]


def _path(first: list[str], second: list[str], expected: tuple[float, float]) -> list[_Step]:
    """The best alignment of an end of `first` with a start of `second`, step by step."""
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
    """Dynamic programming: the best score up to each pair of words, and its last step.

    Steps: 0 consumes a word of both texts, 1 of the first, 2 of the second. An alignment may start
    at any word of the first text; the cost is its distance from the expected word.
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
