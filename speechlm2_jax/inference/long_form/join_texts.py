"""Joins the texts of overlapping chunks where both have the same words.

- The end of one text is aligned with the start of the next (Needleman-Wunsch). A shared word adds
  1 to the score of an alignment. Substitutions and gaps lower it.
- If words repeat, several alignments have similar scores. An alignment is penalised for every word
  by which its length differs from the expected number of words in the overlap. That number follows
  from the fraction of a chunk's speech that lies in the overlap.
- The joined text switches from the first text to the second at the shared word nearest the middle
  of the overlap, because words at the edges of a chunk are often cut off.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from speechlm2_jax.inference.long_form.chunks import Chunk

SUBSTITUTION = -1.0
GAP = -1.6
"""Lower than a substitution by more than 0.5. Otherwise repeated words ("no no no") would be
aligned with each other at the price of gaps at the cut-off words of the edges."""
UNEXPECTED = 1.1
"""Penalty per word more or fewer than expected in the overlap. It exceeds the score 1 of a shared
word."""
MORE_WORDS = 8
"""Twice the expected number of words, and this many more, are compared."""
_MARKS = re.compile(r"[^\w']+")


class Overlap(NamedTuple):
    """Where the joined text switches from one text to the next."""

    keep: int
    """Number of words kept of the first text."""
    skip: int
    """Number of words left out at the start of the second text."""


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
    """Finds where to switch from the first text to the second. Ignores case and punctuation.

    `expected` holds two estimates: how many words of the first text, and how many of the second
    text, lie in the overlap.
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
    """Numbers of words of both texts consumed after one step of an alignment."""

    first: int
    second: int
    is_same: bool


def _plain(words: Sequence[str]) -> list[str]:
    return [_MARKS.sub("", word).casefold() or word for word in words]


def _path(first: list[str], second: list[str], expected: tuple[float, float]) -> list[_Step]:
    """The best alignment of an end of `first` with a start of `second`, step by step."""
    same = np.array([[a == b for b in second] for a in first], bool)
    same = same.reshape(len(first), len(second))
    score, last_step = _fill(same, expected[0])
    ends = score[-1] - UNEXPECTED / 2 * np.abs(np.arange(len(second) + 1) - expected[1])
    i, j = len(first), int(ends.argmax())
    path = []
    while j > 0:
        kind = last_step[i, j]
        path.append(_Step(i, j, bool(kind == 0 and same[i - 1, j - 1])))
        i, j = i - (kind != 2), j - (kind != 1)
    return path[::-1]


def _fill(same: np.ndarray, expected: float) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic programming: the best score up to each pair of words, and the last step of its path.

    Step 0 consumes a word of both texts, step 1 a word of the first, step 2 a word of the second.
    An alignment may start at any word of the first text. The further that word is from the
    expected one, the higher the penalty.
    """
    rows, columns = same.shape
    score = np.full((rows + 1, columns + 1), -np.inf)
    last_step = np.zeros((rows + 1, columns + 1), np.int8)
    score[:, 0] = -UNEXPECTED / 2 * np.abs(rows - np.arange(rows + 1) - expected)
    score[0, 1:], last_step[0, 1:] = score[0, 0] + GAP * np.arange(1, columns + 1), 2
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            ways = (
                score[i - 1, j - 1] + (1.0 if same[i - 1, j - 1] else SUBSTITUTION),
                score[i - 1, j] + GAP,
                score[i, j - 1] + GAP,
            )
            last_step[i, j] = max(range(3), key=ways.__getitem__)
            score[i, j] = ways[last_step[i, j]]
    return score, last_step
