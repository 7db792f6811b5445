"""Results of a duplex evaluation: a row per conversation, and a table of scores."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from speechlm2_jax.evaluation.duplex.turns import TranscribedTurn
from speechlm2_jax.evaluation.metrics.full_duplex import FullDuplexCounts
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenCounts
from speechlm2_jax.evaluation.metrics.turn_taking import TurnMark
from speechlm2_jax.evaluation.metrics.wer import (
    WordErrors,
    merges_compounds,
    text_normalizer,
    word_errors,
)
from speechlm2_jax.evaluation.results import LENGTH_EDGES_S, Speed
from speechlm2_jax.evaluation.score_table import percent

SCORES: Mapping[str, tuple[str, str]] = {
    "right_text": ("conversations with the right text", "share"),
    "txt_bleu": ("text BLEU", "points"),
    "asr_bleu": ("ASR-BLEU of the speech", "points"),
    "wer": ("WER of the speech", "share"),
    "cer": ("CER of the speech", "share"),
    "empty_text_rate": ("empty responses", "share"),
    "txt_token_acc": ("text tokens correct", "share"),
    "audio_token_acc": ("codes correct", "share"),
    "audio_token_acc_of_silence": ("codes correct, of silence", "share"),
    "turn_taking_precision": ("turns in place (precision)", "share"),
    "turn_taking_recall": ("user turns with a response (recall)", "share"),
    "turn_taking_f1": ("turn-taking F1", "share"),
    "turn_taking_latency_mean_s": ("latency, mean", "seconds"),
    "turn_taking_latency_median_s": ("latency, median", "seconds"),
    "barge_in_success": ("barge-ins given way to", "share"),
    "takeover_rate": ("takeovers after turns", "share"),
    "takeover_latency_s": ("their latency", "seconds"),
    "pause_takeover_rate": ("takeovers in pauses (less is better)", "share"),
    "back_channel_resume_rate": ("back-channels, agent goes on", "share"),
    "interruption_stop_rate": ("interruptions, agent stops", "share"),
    "interruption_stop_latency_s": ("until it stops", "seconds"),
    "interruption_takeover_rate": ("takeovers after interruptions", "share"),
    "interruption_latency_s": ("their latency, interrupted", "seconds"),
}
"""Every score: its label and its unit."""


@dataclass(frozen=True, kw_only=True)
class DialogueResult:
    """The result for one conversation."""

    id: str
    set_name: str
    duration_s: float
    user_text: str | None
    """Transcript of the user's side, if known."""
    text: str | None
    """Reference of the agent's side; None if there is none."""
    pred_text: str
    """Text that the agent generated; empty if there is an error."""
    asr_text: str | None = None
    """Transcript of the agent's speech by the scoring ASR model."""
    audio: str | None = None
    """File of the agent's speech."""
    user_turns: tuple[TranscribedTurn, ...] = ()
    reference_turns: tuple[TranscribedTurn, ...] = ()
    agent_turns: tuple[TranscribedTurn, ...] = ()
    marks: tuple[TurnMark, ...] = ()
    counts: TokenCounts | None = None
    events: FullDuplexCounts | None = None
    """Takeovers, pauses, back-channels and interruptions."""
    rtf: float | None = None
    """Real-time factor: seconds of generation per second of audio in its batch."""
    error: str | None = None
    """Why there is no response."""
    cause: str | None = None
    """Kind of the error, for counting."""

    @property
    def length(self) -> str:
        """Its length class, as `6 to 8 s`."""
        low = max(edge for edge in LENGTH_EDGES_S if edge <= self.duration_s)
        high = [edge for edge in LENGTH_EDGES_S if edge > low]
        return f"{low} to {high[0]} s" if high else f"over {low} s"

    def word_errors(self, normalizer: str | bool | None) -> WordErrors | None:
        """Word errors of its text; None without a reference."""
        if self.text is None:
            return None
        normalize = text_normalizer(normalizer)
        return word_errors(
            [normalize(self.text)],
            [normalize(self.pred_text)],
            merge_compounds=merges_compounds(normalizer),
        )

    def summary(self) -> str:
        """Reference and hypothesis, as lines for the terminal."""
        if self.text is None:
            return f"{self.id}: {self.pred_text}"
        return f"{self.id}\n  reference:  {self.text}\n  hypothesis: {self.pred_text}"

    def row(self, normalizer: str | bool | None) -> dict[str, Any]:
        """Its line of answers.jsonl."""
        row: dict[str, Any] = {
            "id": self.id,
            "set": self.set_name,
            "duration": round(self.duration_s, 3),
            "user_text": self.user_text,
            "text": self.text,
            "pred_text": self.pred_text,
        }
        for key, value in (("heard", self.asr_text), ("audio", self.audio), ("error", self.error)):
            if value is not None:
                row[key] = value
        if self.error is None:
            row["user_turns"] = [turn.plain() for turn in self.user_turns]
            row["agent_turns"] = [turn.plain() for turn in self.agent_turns]
            row["scores"] = self._scores(normalizer)
        return row

    def _scores(self, normalizer: str | bool | None) -> dict[str, Any]:
        errors = self.word_errors(normalizer)
        scores: dict[str, Any] = {} if errors is None else {"txt_wer": errors.wer}
        if errors is not None and self.asr_text is not None:
            normalize = text_normalizer(normalizer)
            scores["wer"] = word_errors(
                [normalize(self.text or "")],
                [normalize(self.asr_text)],
                merge_compounds=merges_compounds(normalizer),
            ).wer
        scores |= {} if self.counts is None else self.counts.scores()
        kinds = Counter(mark.kind for mark in self.marks)
        latencies = [round(m.seconds, 3) for m in self.marks if m.kind == "response"]
        return scores | {
            **({} if self.events is None else {"events": _plain(self.events)}),
            "latencies_s": latencies,
            "unanswered": kinds["unanswered"],
            "barge_ins": kinds["barge_in"] + kinds["talked_over"],
            "barge_ins_given_way_to": kinds["barge_in"],
        }


def _plain(events: FullDuplexCounts) -> dict[str, Any]:
    """Counts that are not zero, and latencies in ms precision."""
    return {
        key: [round(one, 3) for one in value] if isinstance(value, tuple) else value
        for key, value in asdict(events).items()
        if value
    }


@dataclass(frozen=True, kw_only=True)
class DuplexEvaluation:
    """Results in input order, their scores, and the speed."""

    results: tuple[DialogueResult, ...]
    scores: Mapping[str, float]
    """`KEY_SET` per set and `KEY`, as `DuplexScorer.compute` gives them."""
    speed: Speed
    silence: Mapping[str, float] = field(default_factory=dict)
    """The same of an agent that generates pads and silence."""

    @property
    def set_names(self) -> list[str]:
        """The sets, in input order."""
        return list(dict.fromkeys(result.set_name for result in self.results))

    def rows(self, normalizer: str | bool | None) -> list[dict[str, Any]]:
        """A row per conversation."""
        return [result.row(normalizer) for result in self.results]

    def totals(self) -> dict[str, Any]:
        """All numbers of the table."""
        failed = Counter(a.cause or "unknown" for a in self.results if a.error is not None)
        return {
            "conversations": len(self.results),
            "failed": dict(sorted(failed.items())),
            "audio_s": round(self.speed.audio_s, 3),
            "generate_s": round(self.speed.generate_s, 3),
            **self._both(""),
            "by_set": {
                name: {
                    "conversations": sum(a.set_name == name for a in self.results),
                    **self._both(f"_{name}"),
                }
                for name in self.set_names
            },
            "rtfx": self.speed.rtfx,
            "rtfx_without_warm_up": self.speed.rtfx_warm,
        }

    def _both(self, suffix: str) -> dict[str, dict[str, float | None]]:
        """Scores of the model, and of an agent of pads and silence."""
        return {
            "scores": _named(self.scores, suffix),
            "scores_of_silence": _named(self.silence, suffix),
        }


def _named(scores: Mapping[str, float], suffix: str) -> dict[str, float | None]:
    """Scores by key. An infinite or NaN score is None, as JSON has no number for it."""
    found = {key: scores.get(f"{key}{suffix}") for key in SCORES}
    return {
        key: value if math.isfinite(value) else None
        for key, value in found.items()
        if value is not None
    }


def duplex_table(totals: Mapping[str, Any]) -> str:
    """The totals as text: a column per set, and one for their mean if there are several."""
    failed = ", ".join(f"{n} {cause}" for cause, n in totals["failed"].items()) or "none"
    sets = totals["by_set"]
    columns = {**sets, "mean": totals} if len(sets) > 1 else sets
    is_compared = any(found.get("scores_of_silence") for found in columns.values())
    lines = [["model | pads and silence" if is_compared else "", *columns]]
    lines += [
        [SCORES[key][0], *(format_both(key, found) for found in columns.values())]
        for key in SCORES
        if key in totals["scores"]
    ]
    counts = [str(found["conversations"]) for found in sets.values()]
    total = [str(totals["conversations"])] if len(sets) > 1 else []
    lines.append(["conversations", *counts, *total])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    speed = [totals["rtfx"], totals["rtfx_without_warm_up"]]
    rtfx, warm = ("n/a" if value is None else f"{value:.1f}" for value in speed)
    return "\n".join(
        [
            *text,
            f"failed: {failed}",
            f"{totals['audio_s']:.1f} s of audio in {totals['generate_s']:.1f} s: RTFx {rtfx}, "
            f"without warm-up {warm}",
        ]
    )


def format_score(key: str, scores: Mapping[str, float | None]) -> str:
    """A score with its unit, or n/a."""
    value, unit = scores.get(key), SCORES[key][1]
    if value is None:
        return "n/a"
    return {"points": f"{value:.2f}", "share": percent(value), "seconds": f"{value:.2f} s"}[unit]


def format_both(key: str, totals: Mapping[str, Any]) -> str:
    """A score of the model and, if there is one, of an agent of pads and silence."""
    own = format_score(key, totals["scores"])
    silent = totals.get("scores_of_silence", {})
    return f"{own} | {format_score(key, silent)}" if key in silent else own
