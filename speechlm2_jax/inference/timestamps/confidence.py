"""Confidence of the words of a generated text: the probability that the LLM gave each.

The confidence of a word is the product of the probabilities of its tokens: that of this word after
the text before it. Tokens without a letter or digit (punctuation, spaces) do not count. A token
that two words share counts for both.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

ToText = Callable[[Sequence[int]], str]
"""Token ids -> their text."""


def word_confidences(
    ids: Sequence[int], logprobs: Float[np.ndarray, " T"] | Sequence[float], to_text: ToText
) -> list[float]:
    """The confidence, from 0 to 1, of each word (split at white space) of a text.

    `ids` are the tokens of the text without those that end it, with a log-probability in nats each.
    """
    spans = token_spans(ids, to_text)
    text = to_text(ids)
    return [
        math.exp(sum(logprobs[n] for n, own in enumerate(spans) if _is_in(own, word, text)))
        for word in word_spans(text)
    ]


def token_spans(ids: Sequence[int], to_text: ToText) -> list[tuple[int, int]]:
    """The characters [start, end) that each token adds to the text.

    A token of an incomplete character gets the characters up to its last token.
    """
    lengths = [0]
    for count in range(1, len(ids) + 1):
        text = to_text(ids[:count])
        lengths.append(max(len(text.rstrip("\ufffd")), lengths[-1]))
    ends = [
        next((x for x in lengths[n + 1 :] if x > lengths[n]), lengths[n]) for n in range(len(ids))
    ]
    return list(zip(lengths, ends, strict=False))


def word_spans(text: str) -> list[tuple[int, int]]:
    """The characters [start, end) of each word."""
    spans, start = [], 0
    for word in text.split():
        start = text.index(word, start)
        spans.append((start, start + len(word)))
        start += len(word)
    return spans


def _is_in(token: tuple[int, int], word: tuple[int, int], text: str) -> bool:
    """Whether letters or digits of a token are in a word."""
    start, end = max(token[0], word[0]), min(token[1], word[1])
    return any(c.isalnum() for c in text[start:end])
