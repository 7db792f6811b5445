"""The numbers at the top of a report."""

from collections.abc import Mapping
from typing import Any

from speechlm2_jax.evaluation.comparisons import CONTROLS
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS
from speechlm2_jax.evaluation.score_table import interval


def figures(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers at the top of the page."""
    kinds = ("substitute", "delete", "insert")
    counts = [totals[name] for name in ("substitutions", "deletions", "insertions")]
    parts = [{"kind": k, "count": c} for k, c in zip(kinds, counts, strict=True) if c]
    note = (
        "{} substituted, {} deleted, {} inserted".format(*counts)
        + f" in {totals['reference_words']} words{interval(totals['metrics'].get('wer'))}"
    )
    name = "WER, audio swapped" if totals["audio_is_swapped"] else "Word error rate"
    found = [{"name": name, **_rate(totals["wer"]), "parts": parts, "note": note}]
    if totals["unseen"] is not None:
        names = totals["unseen_voices"]
        note = ", ".join(names) if len(names) <= 3 else f"{len(names)} voices"
        found.append({"name": "Unseen voices", **_rate(totals["unseen"]["wer"]), "note": note})
    if totals["encoder"] is not None:
        note = "its own CTC head, same audio"
        found.append({"name": "Encoder alone", **_rate(totals["encoder"]["wer"]), "note": note})
    found += _control_figures(totals)
    found += _seed_figure(totals)
    found += [_metric_figure(m) for name, m in totals["metrics"].items() if name != "wer"]
    failed = sum(totals["failed"].values())
    scored, total = totals["scored"], totals["utterances"]
    note = f"of {total}, {failed} could not be read" if failed else f"of {total}"
    found.append({"name": "Utterances scored", "value": scored, "unit": "", "note": note})
    found += speed_figure(totals)
    return [{"parts": [], **figure} for figure in found]


def _control_figures(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The score of each control."""
    found = []
    for name, title in CONTROLS.items():
        if (one := totals["comparisons"].get(name)) is None or one["other"]["value"] is None:
            continue
        score, metric = one["other"], TASK_METRICS[one["metric"]]
        found.append(
            {
                "name": title.capitalize(),
                "value": f"{score['value']:.2f}",
                "unit": "%" if metric.is_share else "",
                "note": f"control; 95 %: {score['low']:.2f} to {score['high']:.2f}",
            }
        )
    return found


def _seed_figure(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, if there are several."""
    seeds = totals["seeds"]
    if seeds is None or seeds["mean"] is None:
        return []
    each = ", ".join(f"{value:.2f}" for value in seeds["values"].values())
    metric = TASK_METRICS[seeds["metric"]]
    return [
        {
            "name": f"Mean of {len(seeds['values'])} seeds",
            "value": f"{seeds['mean']:.2f}",
            "unit": "%" if metric.is_share else "",
            "note": f"standard deviation {seeds['deviation']:.2f}; {each}",
        }
    ]


def _metric_figure(found: Mapping[str, Any]) -> dict[str, Any]:
    """A task metric, its 95 % interval, and its details."""
    value = found["value"]
    notes = [] if found["low"] is None else [f"95 %: {found['low']:.2f} to {found['high']:.2f}"]
    notes += [f"{key} {share:.0f}" for key, share in found["details"].items()]
    shown = "n/a" if value is None else f"{value:.2f}"
    return {"name": found["title"], "value": shown, "unit": "", "note": "; ".join(notes)}


def speed_figure(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The RTFx figure, if there was any generation."""
    warm = totals["rtfx_without_warm_up"]
    if (rtfx := warm or totals["rtfx"]) is None:
        return []
    note = "seconds of audio per second" + ("" if warm else ", compilation included")
    return [{"name": "Speed (RTFx)", "value": f"{rtfx:.1f}", "unit": "×", "note": note}]


def _rate(wer: float | None) -> dict[str, str]:
    return {
        "value": "n/a" if wer is None else f"{100 * wer:.2f}",
        "unit": "" if wer is None else "%",
    }
