"""Metrics of responses: each gives counts, and the sums of the counts give the metric.

So any resample of the responses has its metric at the price of a sum: confidence intervals and
paired tests (`resampling.py`) need no second scoring.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from speechlm2_jax.evaluation.metrics import instructions
from speechlm2_jax.evaluation.metrics.wer import merges_compounds, text_normalizer, word_errors


class Pair(NamedTuple):
    """Reference and hypothesis, not normalised, and the loss of the reference."""

    reference: str
    hypothesis: str
    nll: float = 0.0
    """Sum of the negative log-likelihoods of the reference's tokens, in nats."""
    tokens: int = 0
    """Number of these tokens; 0: not computed."""


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """A metric of a set of responses."""

    title: str
    more_is_better: bool
    counts: Callable[[Pair, str | bool | None], Sequence[float]]
    """A pair of texts and the name of a normaliser -> the counts of one response."""
    value: Callable[[Sequence[float]], float | None]
    """The sums of the counts -> the metric, in percent or points; None without references."""
    is_share: bool = True
    """Whether the value is a share in percent."""
    details: Callable[[Sequence[Pair], str | bool | None], Mapping[str, float]] = lambda *_: {}
    """Pairs of texts and the name of a normaliser -> further values by name, in percent."""

    def matrix(self, pairs: Sequence[Pair], normalizer: str | bool | None) -> np.ndarray:
        """The counts of all responses, [responses, counts]."""
        return np.asarray([self.counts(pair, normalizer) for pair in pairs], np.float64)


def _share(sums: Sequence[float]) -> float | None:
    """The first sum over the second, in percent."""
    return 100.0 * sums[0] / sums[1] if sums[1] else None


def _word_counts(pair: Pair, normalizer: str | bool | None) -> Sequence[float]:
    normalize = text_normalizer(normalizer)
    texts = [normalize(pair[0])], [normalize(pair[1])]
    errors = word_errors(*texts, merge_compounds=merges_compounds(normalizer))
    return errors.errors, errors.reference_words


def _character_counts(pair: Pair, normalizer: str | bool | None) -> Sequence[float]:
    """Edits and reference characters, spaces included."""
    from rapidfuzz.distance import Levenshtein

    reference, hypothesis = map(text_normalizer(normalizer), pair[:2])
    return Levenshtein.distance(reference, hypothesis), len(reference)


def _sacrebleu(name: str) -> dict[str, Any]:
    """BLEU or chrF2 of sacrebleu, 0 to 100, of the texts as they are."""

    @functools.cache
    def metric() -> Any:
        from sacrebleu.metrics import BLEU, CHRF

        return BLEU() if name == "bleu" else CHRF()

    def counts(pair: Pair, _normalizer: object) -> Sequence[float]:
        return metric()._extract_corpus_statistics([pair[1]], [[pair[0]]])[0]

    def value(sums: Sequence[float]) -> float | None:
        return metric()._compute_score_from_stats([int(one) for one in sums]).score

    return {"counts": counts, "value": value}


INTENT = "intent"
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def read_command(text: str) -> dict[str, str] | None:
    """The JSON object of a response, values in lower case; None if there is none."""
    found = _OBJECT.search(text)
    try:
        command = json.loads(found.group()) if found else None
    except ValueError:
        return None
    if not isinstance(command, dict):
        return None
    return {str(k): " ".join(str(v).lower().split()) for k, v in command.items()}


def _intent_counts(pair: Pair, _normalizer: object) -> Sequence[float]:
    """A command is accepted if its intent and all slots are right, and no slot is added."""
    reference, hypothesis = map(read_command, pair[:2])
    if reference is None:
        return 0.0, 0.0
    return float(reference == hypothesis), 1.0


def _slots(pairs: Sequence[Pair], _normalizer: object) -> dict[str, float]:
    """Of each key of the references: the share with the right value, in percent."""
    right: dict[str, list[bool]] = {}
    for pair in pairs:
        reference, hypothesis = map(read_command, pair[:2])
        for key, value in (reference or {}).items():
            right.setdefault(key, []).append((hypothesis or {}).get(key) == value)
    return {key: 100.0 * sum(values) / len(values) for key, values in sorted(right.items())}


_CHOICE = re.compile(
    r"^\W*(?:(?:the\s+)?(?:correct\s+)?(?:ans\w+|option|choice)\s*(?:is\b)?\W*)?([a-z])(?![a-z])",
    re.IGNORECASE,
)


def read_choice(text: str) -> str | None:
    """The letter that a response chooses, such as `B`, `(b) tea` or `Option B`, in upper case."""
    found = _CHOICE.match(text)
    return found.group(1).upper() if found else None


def _choice_counts(pair: Pair, _normalizer: object) -> Sequence[float]:
    reference, hypothesis = map(read_choice, pair[:2])
    return (0.0, 0.0) if reference is None else (float(reference == hypothesis), 1.0)


def _instruction_counts(pair: Pair, normalizer: str | bool | None) -> Sequence[float]:
    has_words = instructions.form_of(pair[0]) is not None
    return float(instructions.is_right(pair[0], pair[1], normalizer)), float(has_words)


def _instruction_details(
    pairs: Sequence[Pair], normalizer: str | bool | None
) -> Mapping[str, float]:
    return instructions.details([(pair[0], pair[1]) for pair in pairs], normalizer)


PERPLEXITY = "perplexity"
_MOST_NATS = 700.0
"""`exp` of more exceeds a float."""


def perplexity(sums: Sequence[float]) -> float | None:
    """Perplexity of (negative log-likelihood in nats, number of tokens); None without tokens."""
    return math.exp(min(sums[0] / sums[1], _MOST_NATS)) if sums[1] else None


def _loss_counts(pair: Pair, _normalizer: object) -> Sequence[float]:
    return pair.nll, pair.tokens


TASK_METRICS: Mapping[str, TaskMetric] = {
    "wer": TaskMetric(title="WER", more_is_better=False, counts=_word_counts, value=_share),
    "cer": TaskMetric(title="CER", more_is_better=False, counts=_character_counts, value=_share),
    "bleu": TaskMetric(title="BLEU", more_is_better=True, is_share=False, **_sacrebleu("bleu")),
    "chrf": TaskMetric(title="chrF", more_is_better=True, is_share=False, **_sacrebleu("chrf")),
    INTENT: TaskMetric(
        title="commands accepted",
        more_is_better=True,
        counts=_intent_counts,
        value=_share,
        details=_slots,
    ),
    "mcq": TaskMetric(
        title="choices right", more_is_better=True, counts=_choice_counts, value=_share
    ),
    "instruction": TaskMetric(
        title="instructions followed",
        more_is_better=True,
        counts=_instruction_counts,
        value=_share,
        details=_instruction_details,
    ),
    PERPLEXITY: TaskMetric(
        title="perplexity",
        more_is_better=False,
        counts=_loss_counts,
        value=perplexity,
        is_share=False,
    ),
}
"""Name -> metric; `metrics` of evaluate.py names them."""


def check_metrics(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown name."""
    for name in names:
        if name not in TASK_METRICS:
            near = difflib.get_close_matches(name, TASK_METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASK_METRICS)}"
            raise ValueError(f"metrics: {name!r} is unknown; {hint}")
