"""What an evaluation leaves behind: one JSON row per utterance, a provenance row, a table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.evaluation.wer import WordErrors, text_normalizer, word_errors


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one utterance."""

    id: str
    duration_s: float
    text: str | None
    """The reference as given."""
    pred_text: str
    """The answer as given; empty if there is an error."""
    error: str | None = None
    """Why there is no answer."""
    cause: str | None = None
    """The error's kind, for counting."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of audio answered per second of generation (RTFx), reading excluded."""

    audio_s: float = 0.0
    generate_s: float = 0.0
    warm_audio_s: float = 0.0
    """Audio of the batches during which nothing was compiled."""
    warm_generate_s: float = 0.0

    def add(self, audio_s: float, generate_s: float, *, compiled: bool) -> "Speed":
        """Counts one more batch."""
        return Speed(
            audio_s=self.audio_s + audio_s,
            generate_s=self.generate_s + generate_s,
            warm_audio_s=self.warm_audio_s + (0.0 if compiled else audio_s),
            warm_generate_s=self.warm_generate_s + (0.0 if compiled else generate_s),
        )

    @property
    def rtfx(self) -> float | None:
        """With warm-up: every batch counts, compilation included."""
        return self.audio_s / self.generate_s if self.generate_s else None

    @property
    def rtfx_warm(self) -> float | None:
        """Without warm-up; None if every batch compiled something."""
        return self.warm_audio_s / self.warm_generate_s if self.warm_generate_s else None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The answers in input order, and how fast they came."""

    answers: tuple[Answer, ...]
    speed: Speed
    normalizer: str | bool | None = "english"

    def rows(self) -> list[dict[str, Any]]:
        """NeMo's four keys, the texts before normalisation, and the error where there is one."""
        normalize = text_normalizer(self.normalizer)
        rows: list[dict[str, Any]] = []
        for answer in self.answers:
            row = {
                "id": answer.id,
                "duration": answer.duration_s,
                "text": None if answer.text is None else normalize(answer.text),
                "pred_text": normalize(answer.pred_text),
                "text_raw": answer.text,
                "pred_text_raw": answer.pred_text,
            }
            rows.append(row if answer.error is None else {**row, "error": answer.error})
        return rows

    def word_errors(self) -> WordErrors:
        """Over the utterances that have a reference and an answer."""
        pairs = [
            (row["text"], row["pred_text"])
            for row in self.rows()
            if row["text"] is not None and "error" not in row
        ]
        return word_errors([text for text, _ in pairs], [answer for _, answer in pairs])

    def totals(self) -> dict[str, Any]:
        """Everything that the table shows, as plain numbers."""
        errors = self.word_errors()
        failed = Counter(a.cause or "unknown" for a in self.answers if a.error is not None)
        return {
            "utterances": len(self.answers),
            "scored": errors.utterances,
            "failed": dict(sorted(failed.items())),
            "audio_s": round(self.speed.audio_s, 3),
            "generate_s": round(self.speed.generate_s, 3),
            "wer": errors.wer,
            "insertions": errors.insertions,
            "deletions": errors.deletions,
            "substitutions": errors.substitutions,
            "reference_words": errors.reference_words,
            "empty_references": errors.empty_references,
            "rtfx": self.speed.rtfx,
            "rtfx_without_warm_up": self.speed.rtfx_warm,
        }


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> None:
    """Writes the rows in order, then `{"provenance": ...}`; a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in (*rows, {"provenance": provenance}):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)


def table(totals: Mapping[str, Any]) -> str:
    """The totals for a reader; word errors only where something had a reference."""
    failed = ", ".join(f"{n} {cause}" for cause, n in totals["failed"].items()) or "none"
    lines = [("utterances", f"{totals['utterances']} (failed: {failed})")]
    lines.append(("audio", f"{totals['audio_s']:.1f} s in {totals['generate_s']:.1f} s"))
    if totals["scored"]:
        words = totals["reference_words"]
        lines.append(("WER", f"{_percent(totals['wer'])} over {words} words"))
        for name in ("insertions", "deletions", "substitutions"):
            rate = totals[name] / words if words else None
            lines.append((f"  {name}", f"{totals[name]} ({_percent(rate)})"))
        if totals["empty_references"]:
            lines.append(("  empty references", str(totals["empty_references"])))
    lines.append(("RTFx", _number(totals["rtfx"])))
    lines.append(("RTFx without warm-up", _number(totals["rtfx_without_warm_up"])))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _percent(rate: float | None) -> str:
    return "n/a" if rate is None else f"{rate:.2%}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
