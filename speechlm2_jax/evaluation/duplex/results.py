"""What an evaluation of a duplex model leaves behind: a row per conversation, and a table."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speechlm2_jax.evaluation.duplex.turns import SaidTurn
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenCounts
from speechlm2_jax.evaluation.metrics.turn_taking import TurnMark
from speechlm2_jax.evaluation.metrics.wer import WordErrors, text_normalizer, word_errors
from speechlm2_jax.evaluation.results import LENGTH_EDGES_S, Speed, percent

SCORES: Mapping[str, tuple[str, str]] = {
    "txt_bleu": ("text BLEU", "points"),
    "asr_bleu": ("ASR-BLEU of the speech", "points"),
    "wer": ("WER of the speech", "share"),
    "cer": ("CER of the speech", "share"),
    "empty_text_rate": ("empty answers", "share"),
    "txt_token_acc": ("text tokens right", "share"),
    "audio_token_acc": ("codes right", "share"),
    "audio_token_acc_of_silence": ("codes right, of silence", "share"),
    "turn_taking_precision": ("turns in place (precision)", "share"),
    "turn_taking_recall": ("user turns answered (recall)", "share"),
    "turn_taking_f1": ("turn-taking F1", "share"),
    "turn_taking_latency_mean_s": ("latency, mean", "seconds"),
    "turn_taking_latency_median_s": ("latency, median", "seconds"),
    "barge_in_success": ("barge-ins given way to", "share"),
}
"""Every score: what a reader calls it, and what it is measured in."""


@dataclass(frozen=True, kw_only=True)
class DialogueAnswer:
    """What became of one conversation."""

    id: str
    set_name: str
    duration_s: float
    user_text: str | None
    """All that the user says, where that is known."""
    text: str | None
    """All that the agent should say; None where there is nothing to score."""
    pred_text: str
    """All that the agent said; empty if there is an error."""
    heard: str | None = None
    """What the scoring ASR heard of its speech."""
    audio: str | None = None
    """The file of its speech."""
    user_turns: tuple[SaidTurn, ...] = ()
    reference_turns: tuple[SaidTurn, ...] = ()
    agent_turns: tuple[SaidTurn, ...] = ()
    marks: tuple[TurnMark, ...] = ()
    counts: TokenCounts | None = None
    rtf: float | None = None
    """Seconds of generation per second of audio in its batch."""
    error: str | None = None
    """Why there is no answer."""
    cause: str | None = None
    """The error's kind, for counting."""

    @property
    def length(self) -> str:
        """Its length class, as `6 to 8 s`."""
        low = max(edge for edge in LENGTH_EDGES_S if edge <= self.duration_s)
        high = [edge for edge in LENGTH_EDGES_S if edge > low]
        return f"{low} to {high[0]} s" if high else f"over {low} s"

    def word_errors(self, normalizer: str | bool | None) -> WordErrors | None:
        """Of its text; None where there is no reference."""
        if self.text is None:
            return None
        normalize = text_normalizer(normalizer)
        return word_errors([normalize(self.text)], [normalize(self.pred_text)])

    def summary(self) -> str:
        """Reference and answer for a reader."""
        if self.text is None:
            return f"{self.id}: {self.pred_text}"
        return f"{self.id}\n  reference: {self.text}\n  answer:    {self.pred_text}"

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
        for key, value in (("heard", self.heard), ("audio", self.audio), ("error", self.error)):
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
        if errors is not None and self.heard is not None:
            normalize = text_normalizer(normalizer)
            scores["wer"] = word_errors([normalize(self.text or "")], [normalize(self.heard)]).wer
        scores |= {} if self.counts is None else self.counts.scores()
        kinds = Counter(mark.kind for mark in self.marks)
        latencies = [round(m.seconds, 3) for m in self.marks if m.kind == "response"]
        return scores | {
            "latencies_s": latencies,
            "unanswered": kinds["unanswered"],
            "barge_ins": kinds["barge_in"] + kinds["talked_over"],
            "barge_ins_given_way_to": kinds["barge_in"],
        }


@dataclass(frozen=True, kw_only=True)
class DuplexEvaluation:
    """The answers in input order, their scores, and how fast they came."""

    answers: tuple[DialogueAnswer, ...]
    scores: Mapping[str, float]
    """`KEY_SET` per set and `KEY`, as `DuplexScorer.compute` gives them."""
    speed: Speed

    @property
    def set_names(self) -> list[str]:
        """The sets, in input order."""
        return list(dict.fromkeys(answer.set_name for answer in self.answers))

    def rows(self, normalizer: str | bool | None) -> list[dict[str, Any]]:
        """A row per conversation."""
        return [answer.row(normalizer) for answer in self.answers]

    def totals(self) -> dict[str, Any]:
        """Everything that the table shows, as plain numbers."""
        failed = Counter(a.cause or "unknown" for a in self.answers if a.error is not None)
        return {
            "conversations": len(self.answers),
            "failed": dict(sorted(failed.items())),
            "audio_s": round(self.speed.audio_s, 3),
            "generate_s": round(self.speed.generate_s, 3),
            "scores": self._named(""),
            "by_set": {
                name: {
                    "conversations": sum(a.set_name == name for a in self.answers),
                    "scores": self._named(f"_{name}"),
                }
                for name in self.set_names
            },
            "rtfx": self.speed.rtfx,
            "rtfx_without_warm_up": self.speed.rtfx_warm,
        }

    def _named(self, suffix: str) -> dict[str, float | None]:
        """Scores by key; None for one without a finite value, which JSON cannot hold."""
        found = {key: self.scores.get(f"{key}{suffix}") for key in SCORES}
        return {
            key: value if math.isfinite(value) else None
            for key, value in found.items()
            if value is not None
        }


def duplex_table(totals: Mapping[str, Any]) -> str:
    """The totals for a reader: a column per set, and one for their mean where there are several."""
    failed = ", ".join(f"{n} {cause}" for cause, n in totals["failed"].items()) or "none"
    sets = totals["by_set"]
    columns = {name: found["scores"] for name, found in sets.items()}
    if len(sets) > 1:
        columns["mean"] = totals["scores"]
    lines = [["", *columns]]
    lines += [
        [SCORES[key][0], *(said(key, scores) for scores in columns.values())]
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


def said(key: str, scores: Mapping[str, float | None]) -> str:
    """A score for a reader."""
    value, unit = scores.get(key), SCORES[key][1]
    if value is None:
        return "n/a"
    return {"points": f"{value:.2f}", "share": percent(value), "seconds": f"{value:.2f} s"}[unit]
