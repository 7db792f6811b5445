"""The spread of a score over evaluations of one training with several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from speechlm2_jax.evaluation.comparisons import main_metric
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS, Pair, TaskMetric

THIS_SEED = "this one"
"""Name of the evaluation itself among others."""


def seed_scores(
    responses: Mapping[str, Mapping[str, Pair]],
    metrics: Sequence[str],
    normalizer: str | bool | None,
) -> dict[str, Any]:
    """The main metric of each evaluation by name, their mean and standard deviation.

    `responses` are those of each evaluation by id; all have the same ids.
    """
    name = main_metric(metrics)
    values = {
        run: value_of(TASK_METRICS[name], list(pairs.values()), normalizer)
        for run, pairs in responses.items()
    }
    return {"metric": name, "values": values, **spread(list(values.values()))}


def value_of(
    metric: TaskMetric, pairs: Sequence[Pair], normalizer: str | bool | None
) -> float | None:
    """A metric of all responses together."""
    return metric.value(metric.matrix(pairs, normalizer).sum(axis=0)) if pairs else None


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len(known) < 2:
        return {"mean": None, "deviation": None}
    return {"mean": statistics.mean(known), "deviation": statistics.stdev(known)}
