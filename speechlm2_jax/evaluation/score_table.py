"""The scores of an evaluation as text for the terminal."""

from collections.abc import Mapping
from typing import Any

from speechlm2_jax.evaluation.comparisons import CONTROLS
from speechlm2_jax.evaluation.metrics.resampling import Estimate
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS


def table(totals: Mapping[str, Any]) -> str:
    """The totals as text: voices first; word errors only if something has a reference."""
    failed = ", ".join(f"{n} {cause}" for cause, n in totals["failed"].items()) or "none"
    lines = _voice_lines(totals)
    lines.append(("utterances", f"{totals['utterances']} (failed: {failed})"))
    seconds = f"{totals['audio_s']:.1f} s in {totals['generate_s']:.1f} s"
    lines.append(("audio", f"{seconds}, {totals['compiled']} programs compiled"))
    if totals["scored"]:
        lines += _error_lines(totals)
        lines += _metric_lines(totals)
    lines.append(("RTFx", _number(totals["rtfx"])))
    lines.append(("RTFx without warm-up", _number(totals["rtfx_without_warm_up"])))
    if drafted := totals["draft_tokens"]:
        rate = percent(totals["accepted_draft_tokens"] / drafted)
        lines.append(("draft tokens accepted", f"{rate} of {drafted}"))
    width = max(len(name) for name, _ in lines)
    rows = [f"{name:<{width}}  {value}" for name, value in lines]
    return "\n".join([*rows, *(f"- {sentence['text']}" for sentence in totals["verdict"])])


def _voice_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One line per voice, unseen ones first."""
    unseen = totals["unseen_voices"]
    voices = sorted(totals["by_voice"], key=lambda voice: (voice not in unseen, voice))
    mark = {voice: ", unseen" for voice in unseen}
    return [(f"{v}{mark.get(v, '')}", _rate(totals["by_voice"][v])) for v in voices]


def _error_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    words = totals["reference_words"]
    swapped = totals["audio_is_swapped"]
    rate = _rate(totals) + interval(totals["metrics"].get("wer"))
    lines = [("WER, audio swapped" if swapped else "WER", rate)]
    for name in ("insertions", "deletions", "substitutions"):
        rate = totals[name] / words if words else None
        lines.append((f"  {name}", f"{totals[name]} ({percent(rate)})"))
    if totals["empty_references"]:
        lines.append(("  empty references", str(totals["empty_references"])))
    if totals["hallucinated"] is not None:
        minutely = f"{totals['hallucinated']:.1f} characters a minute, where the reference is empty"
        lines.append(("  hallucinated", minutely))
    for name, key in (("WER, unseen voices", "unseen"), ("WER, encoder alone (CTC)", "encoder")):
        if totals[key] is not None:
            lines.append((name, _rate(totals[key])))
    return lines + _control_lines(totals) + _training_lines(totals) + _seed_lines(totals)


def _control_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The score of each control."""
    found = [(c, totals["comparisons"][c]) for c in CONTROLS if c in totals["comparisons"]]
    lines = []
    for name, one in found:
        metric, score = TASK_METRICS[one["metric"]], one["other"]
        value = str(Estimate(**score))
        if metric.is_share and score["value"] is not None:
            value = f"{score['value']:.2f}%{interval(score)}"
        lines.append((f"{metric.title}, {CONTROLS[name]}", value))
    return lines


def _seed_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The score of each seed, mean and standard deviation."""
    found = totals["seeds"]
    if found is None or found["mean"] is None:
        return []
    mean = f"{found['mean']:.2f}, standard deviation {found['deviation']:.2f}"
    title = f"{TASK_METRICS[found['metric']].title}, {len(found['values'])} seeds"
    return [(title, mean), *((f"  {n}", f"{v:.2f}") for n, v in found["values"].items())]


def _training_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How much of the test set is in the training data, and the WER with and without it."""
    found = totals["training"]
    if found is None:
        return []
    counted = f"{found['texts']} references, {found['recordings']} recordings"
    lines = [("in the training data", f"{counted} (of {found['rows']} rows)")]
    lines += [("  not read", name) for name in found["unread"]]
    if found["texts"]:
        for name, key in (("these", "seen_texts"), ("other", "new_texts")):
            if found[key] is not None:
                lines.append((f"  WER, {name} references", _rate(found[key])))
    return lines


def _metric_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for found in (found for name, found in totals["metrics"].items() if name != "wer"):
        score = Estimate(value=found["value"], low=found["low"], high=found["high"])
        lines.append((found["title"], str(score)))
        lines += [(f"  {key}", f"{value:.2f}") for key, value in found["details"].items()]
    return lines


def interval(score: Mapping[str, Any] | None) -> str:
    """The 95 % interval of a share in percent, to follow its value; empty if it has none."""
    if score is None or score["low"] is None:
        return ""
    return f" (95 %: {score['low']:.2f}% to {score['high']:.2f}%)"


def _rate(errors: Mapping[str, Any]) -> str:
    return f"{percent(errors['wer'])} over {errors['reference_words']} words"


def percent(rate: float | None) -> str:
    """A rate in percent with two decimals, or n/a."""
    return "n/a" if rate is None else f"{rate:.2%}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
