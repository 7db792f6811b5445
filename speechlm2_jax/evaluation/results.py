"""What an evaluation leaves behind: one JSON row per utterance, a provenance row, a table."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechlm2_jax.evaluation.metrics.wer import WordErrors, text_normalizer, word_errors

LENGTH_EDGES_S = (0, 1, 2, 3, 4, 6, 8, 12, 20, 30)
"""Where the length classes of the table and the page begin."""


@dataclass(frozen=True, kw_only=True)
class Response:
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
    voice: str | None = None
    is_unseen: bool = False
    """Whether the voice is one that training has not heard."""
    condition: str | None = None
    """How it was recorded."""
    audio_of: str | None = None
    """The utterance whose recording was heard, if it is another one's."""
    encoder_text: str | None = None
    """What the encoder's own CTC head wrote down, if that was asked for."""
    rtf: float | None = None
    """Seconds of generation per second of audio in its batch."""

    @property
    def length(self) -> str:
        """Its length class, as `3 to 4 s`."""
        low = max(edge for edge in LENGTH_EDGES_S if edge <= self.duration_s)
        high = [edge for edge in LENGTH_EDGES_S if edge > low]
        return f"{low} to {high[0]} s" if high else f"over {low} s"

    def row(self, normalizer: str | bool | None) -> dict[str, Any]:
        """NeMo's four keys, the texts before normalisation, and what else there is to say."""
        normalize = text_normalizer(normalizer)
        row = {
            "id": self.id,
            "duration": self.duration_s,
            "text": None if self.text is None else normalize(self.text),
            "pred_text": normalize(self.pred_text),
            "text_raw": self.text,
            "pred_text_raw": self.pred_text,
        }
        named = {n: getattr(self, n) for n in ("voice", "audio_of", "encoder_text", "error")}
        return row | {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ScoredResponse:
    """An answer that has a reference, both normalised."""

    answer: Response
    text: str
    pred_text: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of audio answered per second of generation (RTFx), reading excluded."""

    audio_s: float = 0.0
    generate_s: float = 0.0
    warm_audio_s: float = 0.0
    """Audio of the batches during which nothing was compiled."""
    warm_generate_s: float = 0.0
    compiled: int = 0
    """Programs that were compiled meanwhile, or fetched from those kept on disk."""

    def add(self, audio_s: float, generate_s: float, *, compiled: int) -> "Speed":
        """Counts one more batch, and the programs that were compiled for it."""
        return Speed(
            compiled=self.compiled + compiled,
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

    answers: tuple[Response, ...]
    speed: Speed
    normalizer: str | bool | None = "english"

    def with_encoder_texts(self, texts: Sequence[str | None]) -> "Evaluation":
        """The same with what the encoder's own head wrote down, in input order."""
        pairs = zip(self.answers, texts, strict=True)
        return replace(self, answers=tuple(replace(a, encoder_text=t) for a, t in pairs))

    def rows(self) -> list[dict[str, Any]]:
        """A row per utterance, in input order."""
        return [answer.row(self.normalizer) for answer in self.answers]

    def scored(self) -> list[ScoredResponse]:
        """The answers that have a reference and no error."""
        normalize = text_normalizer(self.normalizer)
        return [
            ScoredResponse(answer=a, text=normalize(a.text), pred_text=normalize(a.pred_text))
            for a in self.answers
            if a.text is not None and a.error is None
        ]

    def word_errors(self) -> WordErrors:
        """Over the utterances that have a reference and an answer."""
        return _errors(self.scored())

    def encoder_errors(self) -> WordErrors | None:
        """Those of the encoder's own head over the same utterances; None if it was not asked."""
        normalize = text_normalizer(self.normalizer)
        pairs = [(s.text, s.answer.encoder_text) for s in self.scored()]
        heard = [(text, normalize(other)) for text, other in pairs if other is not None]
        return word_errors([t for t, _ in heard], [o for _, o in heard]) if heard else None

    def totals(self) -> dict[str, Any]:
        """Everything that the table shows, as plain numbers."""
        scored = self.scored()
        errors = _errors(scored)
        encoder = self.encoder_errors()
        failed = Counter(a.cause or "unknown" for a in self.answers if a.error is not None)
        voices = _by(scored, lambda s: s.answer.voice)
        unseen = [s for s in scored if s.answer.is_unseen]
        return {
            "utterances": len(self.answers),
            "scored": errors.utterances,
            "failed": dict(sorted(failed.items())),
            "audio_s": round(self.speed.audio_s, 3),
            "generate_s": round(self.speed.generate_s, 3),
            "compiled": self.speed.compiled,
            "wer": errors.wer,
            "insertions": errors.insertions,
            "deletions": errors.deletions,
            "substitutions": errors.substitutions,
            "reference_words": errors.reference_words,
            "empty_references": errors.empty_references,
            "by_voice": {name: voices[name].plain() for name in sorted(voices)},
            "unseen_voices": sorted({str(s.answer.voice) for s in unseen}),
            "unseen": _errors(unseen).plain() if unseen else None,
            "by_length": _by_length(scored),
            "encoder": None if encoder is None else encoder.plain(),
            "audio_is_swapped": any(a.audio_of is not None for a in self.answers),
            "rtfx": self.speed.rtfx,
            "rtfx_without_warm_up": self.speed.rtfx_warm,
        }


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> None:
    """Writes the rows in order, then `{"provenance": ...}`; a file that is there is whole."""
    lines = [json.dumps(row, ensure_ascii=False) for row in (*rows, {"provenance": provenance})]
    write_whole(path, "".join(f"{line}\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one go: what is there is never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


def table(totals: Mapping[str, Any]) -> str:
    """The totals for a reader, voices first; word errors only where something had a reference."""
    failed = ", ".join(f"{n} {cause}" for cause, n in totals["failed"].items()) or "none"
    lines = _voice_lines(totals)
    lines.append(("utterances", f"{totals['utterances']} (failed: {failed})"))
    seconds = f"{totals['audio_s']:.1f} s in {totals['generate_s']:.1f} s"
    lines.append(("audio", f"{seconds}, {totals['compiled']} programs compiled"))
    if totals["scored"]:
        lines += _error_lines(totals)
    lines.append(("RTFx", _number(totals["rtfx"])))
    lines.append(("RTFx without warm-up", _number(totals["rtfx_without_warm_up"])))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _voice_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One line per voice, unseen ones first."""
    unseen = totals["unseen_voices"]
    voices = sorted(totals["by_voice"], key=lambda voice: (voice not in unseen, voice))
    mark = {voice: ", unseen" for voice in unseen}
    return [(f"{v}{mark.get(v, '')}", _rate(totals["by_voice"][v])) for v in voices]


def _error_lines(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    words = totals["reference_words"]
    swapped = totals["audio_is_swapped"]
    lines = [("WER, audio swapped" if swapped else "WER", _rate(totals))]
    for name in ("insertions", "deletions", "substitutions"):
        rate = totals[name] / words if words else None
        lines.append((f"  {name}", f"{totals[name]} ({percent(rate)})"))
    if totals["empty_references"]:
        lines.append(("  empty references", str(totals["empty_references"])))
    for name, key in (("WER, unseen voices", "unseen"), ("WER, encoder alone (CTC)", "encoder")):
        if totals[key] is not None:
            lines.append((name, _rate(totals[key])))
    return lines


def _errors(scored: Sequence[ScoredResponse]) -> WordErrors:
    return word_errors([s.text for s in scored], [s.pred_text for s in scored])


def _by(
    scored: Sequence[ScoredResponse], name: Callable[[ScoredResponse], str | None]
) -> dict[str, WordErrors]:
    """Word errors by a name of each answer; answers without one are in none."""
    groups: dict[str, list[ScoredResponse]] = {}
    for one in scored:
        if (key := name(one)) is not None:
            groups.setdefault(key, []).append(one)
    return {key: _errors(group) for key, group in groups.items()}


def _by_length(scored: Sequence[ScoredResponse]) -> dict[str, dict[str, Any]]:
    in_order = sorted(scored, key=lambda s: s.answer.duration_s)
    return {name: e.plain() for name, e in _by(in_order, lambda s: s.answer.length).items()}


def _rate(errors: Mapping[str, Any]) -> str:
    return f"{percent(errors['wer'])} over {errors['reference_words']} words"


def percent(rate: float | None) -> str:
    """A rate for a reader."""
    return "n/a" if rate is None else f"{rate:.2%}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
