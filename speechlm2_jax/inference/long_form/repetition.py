"""Finds texts in which a model has repeated itself without end, as LLMs do over noise."""

from collections.abc import Sequence

LONGEST_PHRASE = 12
"""Longest repeated phrase that is looked for, in words."""
REPETITIONS = (8, 5, 4)
"""How often a phrase of 1, 2, or more words is repeated in a row before it counts as a loop.

People do say "no no no" and "bye bye"."""


def without_loop(text: str) -> str:
    """The text with every phrase that is repeated in a loop written once.

    A text without a loop is returned as it is.
    """
    words = text.split()
    found = _find(words)
    if found is None:
        return text
    while found is not None:
        start, size, count = found
        words = words[: start + size] + words[start + size * count :]
        found = _find(words)
    return " ".join(words)


def has_loop(text: str) -> bool:
    """Whether a phrase is repeated in a loop."""
    return _find(text.split()) is not None


def _find(words: Sequence[str]) -> tuple[int, int, int] | None:
    """The first loop: its first word, the words of its phrase, and how often it is repeated."""
    plain = [word.casefold().strip(".,;:!?") for word in words]
    for size in range(1, LONGEST_PHRASE + 1):
        least = REPETITIONS[min(size, len(REPETITIONS)) - 1]
        run, start = 0, 0
        for n in range(size, len(plain) + 1):
            if n < len(plain) and plain[n] == plain[n - size]:
                start = n - size if not run else start
                run += 1
                continue
            count = 1 + run // size
            if run and count >= least:
                return start, size, count
            run = 0
    return None
