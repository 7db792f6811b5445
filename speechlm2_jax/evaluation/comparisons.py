"""Paired comparisons inside one evaluation: the model with its encoder, and with its controls."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from speechlm2_jax.evaluation.metrics.resampling import compare
from speechlm2_jax.evaluation.metrics.task_metrics import PERPLEXITY, TASK_METRICS, Pair

ENCODER, SWAPPED, SILENT = "encoder", "swapped", "silent"
CONTROLS = {SWAPPED: "swapped audio", SILENT: "silence"}
"""Names of the controls, as tables show them."""
WER = "wer"


def main_metric(metrics: Sequence[str]) -> str:
    """The first metric of the responses; WER if there is none."""
    return next((name for name in metrics if name != PERPLEXITY), WER)


def compared(
    metric: str,
    pairs: Sequence[Pair],
    others: Sequence[str | None],
    normalizer: str | bool | None,
) -> dict[str, Any] | None:
    """Other responses to the same inputs (None: no response) beside the model's.

    In percent or points: `other`, `model`, and `change` from the other to the model, each with its
    95 % interval; `p_value` of the change. None without any other response.
    """
    both = [(pair, text) for pair, text in zip(pairs, others, strict=True) if text is not None]
    if not both:
        return None
    found = compare(
        TASK_METRICS[metric],
        [Pair(pair.reference, text) for pair, text in both],
        [pair for pair, _ in both],
        normalizer,
    )
    return {
        "metric": metric,
        "utterances": len(both),
        "other": asdict(found.first),
        "model": asdict(found.second),
        "change": asdict(found.change),
        "p_value": found.p_value,
    }
