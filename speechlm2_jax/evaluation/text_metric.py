"""Scores of paired texts per data set, and their plain mean over the sets, as NeMo reports them."""

from collections.abc import Callable, Mapping, Sequence

from speechlm2_jax.evaluation.wer import text_normalizer

Score = Callable[[Sequence[str], Sequence[str]], float]
"""References and hypotheses of one data set -> its score."""


class TextMetric:
    """Collects normalised texts by data set and scores each set as one corpus.

    `normalizer` names one of `text_normalizer`; both sides pass it.
    """

    def __init__(
        self, key: str, score: Score, *, normalizer: str | bool | None = "english"
    ) -> None:
        self.key = key
        self._score = score
        self._normalize = text_normalizer(normalizer)
        self._pairs: dict[str, list[tuple[str, str]]] = {}

    def update(self, name: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Adds pairs of texts of data set `name`. Raises ValueError if their numbers differ."""
        if len(references) != len(hypotheses):
            raise ValueError(
                f"{len(references)} references but {len(hypotheses)} hypotheses of {name!r}; "
                "pair each with one"
            )
        texts = zip(references, hypotheses, strict=True)
        pairs = [(self._normalize(reference), self._normalize(text)) for reference, text in texts]
        self._pairs.setdefault(name, []).extend(pairs)

    def merge(self, other: "TextMetric") -> None:
        """Adds what another one of the same kind has collected, on another process for instance."""
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
    """Names the scores of data sets, and adds their unweighted mean; empty without any."""
    if not scores:
        return {}
    named = {f"{key}_{name}": score for name, score in scores.items()}
    return {**named, key: sum(scores.values()) / len(scores)}
