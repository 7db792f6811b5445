"""A verdict in a few sentences, made from the numbers of an evaluation by fixed rules."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from speechlm2_jax.evaluation.comparisons import CONTROLS, ENCODER, SILENT, SWAPPED, main_metric
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS

CHANCE = 0.05
"""A change with a larger p-value is no larger than chance."""
USES_AUDIO, HARDLY_USES = 0.5, 0.1
"""Share of a control's errors that the right audio must remove."""
FEW_UTTERANCES = 100
WIDE_INTERVAL = 0.5
"""Width of an interval as a share of its value, from which differences are hard to see."""
Kind = Literal["good", "bad", "neutral"]


class Sentence(NamedTuple):
    """A sentence of the verdict, and whether it is good news."""

    text: str
    kind: Kind = "neutral"


def verdict(totals: Mapping[str, Any]) -> list[Sentence]:
    """The sentences for the totals of an evaluation, the most important one first.

    What the LLM adds to its encoder, whether the model uses the audio, what of the test set the
    training had, and how exact the score is. Empty if nothing is scored, or the audio is swapped.
    """
    if not totals["scored"] or totals["audio_is_swapped"]:
        return []
    return [
        *_of_encoder(totals),
        *_of_audio(totals),
        *_of_training(totals),
        *_of_size(totals),
        *_of_seeds(totals),
    ]


def _of_encoder(totals: Mapping[str, Any]) -> Iterator[Sentence]:
    """What the LLM makes of the encoder's WER."""
    found = totals["comparisons"].get(ENCODER)
    if found is None or found["change"]["value"] is None:
        return
    before, after, change = (found[name] for name in ("other", "model", "change"))
    text = f"The LLM makes the encoder's {_percent(before)} WER into {_percent(after)}"
    interval = f"(95 %: {change['low']:+.1f} to {change['high']:+.1f} points)"
    if found["p_value"] > CHANCE:
        yield Sentence(f"{text}: no difference larger than chance {interval}.")
    elif change["value"] < 0:
        yield Sentence(f"{text}: better {interval}.", "good")
    else:
        yield Sentence(f"{text}: worse {interval}.", "bad")


def _of_audio(totals: Mapping[str, Any]) -> Iterator[Sentence]:
    """Whether the model needs the audio for what it gets right."""
    found = {n: c for n, c in totals["comparisons"].items() if n in CONTROLS}
    found = {n: c for n, c in found.items() if c["change"]["value"] is not None}
    if not found:
        yield Sentence("Whether it uses the audio is not tested; controls=true tests it.")
        return
    control = found.get(SWAPPED) or found[SILENT]
    metric = TASK_METRICS[control["metric"]]
    scores = [f"{_percent(one['other'])} with {CONTROLS[name]}" for name, one in found.items()]
    text = f"{metric.title} is {_percent(control['model'])}, {' and '.join(scores)}."
    removed = _removed_errors(control, more_is_better=metric.more_is_better)
    if removed < HARDLY_USES:
        yield Sentence(f"It does not use the audio: {text}", "bad")
    elif control["p_value"] > CHANCE:
        yield Sentence(f"It is not certain that it uses the audio: {text}", "bad")
    elif removed < USES_AUDIO:
        yield Sentence(f"It uses the audio only in part: {text}", "bad")
    else:
        yield Sentence(f"It uses the audio: {text}", "good")


def _removed_errors(control: Mapping[str, Any], *, more_is_better: bool) -> float:
    """The share of the control's errors that the right audio removes."""
    before, after = (
        100 - control[name]["value"] if more_is_better else control[name]["value"]
        for name in ("other", "model")
    )
    return (before - after) / before if before else 0.0


def _of_training(totals: Mapping[str, Any]) -> Iterator[Sentence]:
    """What of the test set is in the training data."""
    found = totals["training"]
    if found is None:
        yield Sentence("The training data could not be read, so overlap with it is not known.")
        return
    where = f"the training data ({found['rows']} rows)"
    if found["unread"]:
        where = f"what could be read of the training data ({found['rows']} rows)"
    texts, recordings = found["texts"], found["recordings"]
    if not texts and not recordings:
        kind = "neutral" if found["unread"] else "good"
        yield Sentence(f"No reference and no recording is in {where}.", kind)
        return
    counts = ((texts, "reference"), (recordings, "recording"))
    counted = " and ".join(_count(number, name) for number, name in counts if number)
    apart = ""
    if found["seen_texts"] and found["new_texts"]:
        seen, new = (_rate(found[name]["wer"]) for name in ("seen_texts", "new_texts"))
        apart = f": WER is {seen} on these references, {new} on the others"
    yield Sentence(f"{counted} of the test set are in {where}{apart}.", "bad")


def _of_size(totals: Mapping[str, Any]) -> Iterator[Sentence]:
    """How exact the score is."""
    name = main_metric(tuple(totals["metrics"]))
    found = totals["metrics"].get(name)
    if found is None or found["low"] is None:
        return
    title, low, high = TASK_METRICS[name].title, found["low"], found["high"]
    text = f"{_count(totals['scored'], 'utterance')}: {title} is {_percent(found)}"
    text += f", with 95 % confidence from {low:.1f} to {high:.1f}"
    is_wide = high - low > WIDE_INTERVAL * max(found["value"], 1e-9)
    if totals["scored"] < FEW_UTTERANCES or is_wide:
        yield Sentence(f"{text}. These are too few for small differences.", "bad")
    else:
        yield Sentence(f"{text}.")


def _of_seeds(totals: Mapping[str, Any]) -> Iterator[Sentence]:
    """Mean and spread over seeds."""
    found = totals["seeds"]
    if found is None or found["mean"] is None:
        return
    values = list(found["values"].values())
    each = ", ".join(f"{value:.1f}" for value in values)
    mean = f"{found['mean']:.1f} %, standard deviation {found['deviation']:.1f}"
    title = TASK_METRICS[found["metric"]].title
    yield Sentence(f"Over {len(values)} seeds {title} is {mean} ({each}).")


def _percent(estimate: Mapping[str, Any]) -> str:
    """A value in percent, or points of 100."""
    return f"{estimate['value']:.1f} %"


def _rate(rate: float | None) -> str:
    return "n/a" if rate is None else f"{100 * rate:.1f} %"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
