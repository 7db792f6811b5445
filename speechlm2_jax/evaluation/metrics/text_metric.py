"""Scores of text pairs per data set, and their unweighted mean over the sets, as in NeMo."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from speechlm2_jax.evaluation.metrics.wer import Normalizer, text_normalizer

log = logging.getLogger(__name__)
M = TypeVar("M", bound="TextMetric")
AnyNormalizer = str | bool | Normalizer | None

Score = Callable[[Sequence[str], Sequence[str]], float]
"""References and hypotheses of one data set -> its score."""


class TextMetric:
    """Collects normalised texts by data set and scores each set as one corpus.

    Args:
        key: prefix of the result keys.
        score: computes the score of one data set.
        normalize: false scores the texts as they are.
        normalizer: a name that `text_normalizer` knows, or a function; applied to both texts.
        verbose: log every pair with its own score.
    """

    def __init__(
        self,
        key: str,
        score: Score,
        *,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
    ) -> None:
        self.key, self.verbose = key, verbose
        self._score = score
        if not normalize:
            normalizer = "none"
        self._normalize = normalizer if callable(normalizer) else text_normalizer(normalizer)
        self._pairs: dict[str, list[tuple[str, str]]] = {}

    def update(self, name: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Adds text pairs of data set `name`. Raises ValueError if their numbers differ."""
        if len(references) != len(hypotheses):
            raise ValueError(
                f"{len(references)} references but {len(hypotheses)} hypotheses of {name!r}; "
                "pair each with one"
            )
        texts = zip(references, hypotheses, strict=True)
        pairs = [(self._normalize(reference), self._normalize(text)) for reference, text in texts]
        self._pairs.setdefault(name, []).extend(pairs)
        if self.verbose:
            for (reference, text), (first, second) in zip(
                zip(references, hypotheses, strict=True), pairs, strict=True
            ):
                score = self._score([first], [second])
                log.info(
                    "reference:  %s\nhypothesis: %s [%s %.2f]", reference, text, self.key, score
                )

    def reset(self: M) -> M:
        """Drops all pairs and returns itself, as in NeMo."""
        self._pairs.clear()
        return self

    def merge(self, other: "TextMetric") -> None:
        """Adds the pairs of another metric of the same class, such as that of another process."""
        for name, pairs in other._pairs.items():
            self._pairs.setdefault(name, []).extend(pairs)

    def compute(self) -> dict[str, float]:
        """`KEY_SET` of each set and `KEY`, their mean; empty if nothing was added."""
        scores = {
            name: self._score(*map(list, zip(*pairs, strict=True)))
            for name, pairs in self._pairs.items()
            if pairs
        }
        return by_set(self.key, scores)


def by_set(key: str, scores: Mapping[str, float]) -> dict[str, float]:
    """`KEY_SET` for each set, and `KEY`, their unweighted mean; empty without sets."""
    if not scores:
        return {}
    named = {f"{key}_{name}": score for name, score in scores.items()}
    return {**named, key: sum(scores.values()) / len(scores)}
