"""Confidence intervals and paired tests of metrics, by resampling responses (bootstrap).

Efron and Tibshirani 1993, chapters 13 and 16; for BLEU and paired systems Koehn 2004.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.evaluation.metrics.task_metrics import Pair, TaskMetric

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric of a set, with its confidence interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "n/a"
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} (95 %: {self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much a second set of responses differs from a first one to the same inputs."""

    first: Estimate
    second: Estimate
    change: Estimate
    """Second minus first."""
    p_value: float | None
    """Two-sided: how often a resample has no difference, or one of the other sign."""


def estimate(metric: TaskMetric, pairs: Sequence[Pair], normalizer: str | bool | None) -> Estimate:
    """The metric with its 95 % interval, over whole responses."""
    if not pairs:
        return Estimate(value=None)
    counts = metric.matrix(pairs, normalizer)
    values = [metric.value(counts[rows].sum(axis=0)) for rows in _resamples(len(pairs))]
    return _with_interval(metric.value(counts.sum(axis=0)), values)


def compare(
    metric: TaskMetric,
    first: Sequence[Pair],
    second: Sequence[Pair],
    normalizer: str | bool | None,
) -> PairedDifference:
    """A paired bootstrap test; both have the same references in the same order."""
    counts = [metric.matrix(pairs, normalizer) for pairs in (first, second)]
    resampled: tuple[list[float | None], ...] = ([], [], [])
    for rows in _resamples(len(first)):
        one, other = (metric.value(part[rows].sum(axis=0)) for part in counts)
        for values, value in zip(resampled, (one, other, _minus(other, one)), strict=True):
            values.append(value)
    one, other = (metric.value(part.sum(axis=0)) for part in counts)
    changes = np.asarray([value for value in resampled[2] if value is not None])
    p_value = None
    if len(changes):
        tail = min(np.mean(changes <= 0), np.mean(changes >= 0))
        p_value = min(1.0, 2 * max(float(tail), 1 / len(changes)))
        if not np.any(changes):
            p_value = 1.0
    return PairedDifference(
        first=_with_interval(one, resampled[0]),
        second=_with_interval(other, resampled[1]),
        change=_with_interval(_minus(other, one), resampled[2]),
        p_value=p_value,
    )


def _resamples(count: int) -> Iterator[np.ndarray]:
    """Rows of each resample, with replacement, always the same ones."""
    generator = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield generator.integers(count, size=count)


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _with_interval(value: float | None, resampled: Sequence[float | None]) -> Estimate:
    known = [one for one in resampled if one is not None]
    if value is None or not known:
        return Estimate(value=value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high))
