"""Results of an evaluation: one JSON row per utterance, a provenance row, a table of scores."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from speechlm2_jax.evaluation.comparisons import CONTROLS, ENCODER, WER, compared, main_metric
from speechlm2_jax.evaluation.dialogs import EvaluatedDialog
from speechlm2_jax.evaluation.metrics.resampling import estimate
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS, Pair
from speechlm2_jax.evaluation.metrics.wer import (
    WordErrors,
    merges_compounds,
    text_normalizer,
    word_errors,
)
from speechlm2_jax.evaluation.seeds import THIS_SEED, seed_scores
from speechlm2_jax.evaluation.verdict import verdict
from speechlm2_jax.inference.log_likelihood import ResponseLoss

LENGTH_EDGES_S = (0, 1, 2, 3, 4, 6, 8, 12, 20, 30)
"""Lower edges of the length classes in table and report."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """The result for one utterance."""

    id: str
    duration_s: float
    text: str | None
    """The reference before normalisation; None if there is none."""
    pred_text: str
    """The generated text before normalisation; empty if there is an error."""
    error: str | None = None
    """Why there is no response."""
    cause: str | None = None
    """Kind of the error, for counting."""
    voice: str | None = None
    is_unseen: bool = False
    """Whether the voice does not occur in the training data."""
    is_seen_text: bool = False
    """Whether the reference is also a response of the training data."""
    is_seen_audio: bool = False
    """Whether the recording is also one of the training data."""
    condition: str | None = None
    """Recording condition."""
    audio_of: str | None = None
    """Id of the utterance whose recording was used, if the audio was swapped."""
    encoder_text: str | None = None
    """Transcript by the encoder's own CTC head, with `encoder_wer`."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """Responses to swapped audio and to silence, by the names of CONTROLS."""
    loss: ResponseLoss | None = None
    """How likely the model finds the reference, with `perplexity`."""
    rtf: float | None = None
    """Real-time factor: seconds of generation per second of audio in its batch."""
    dialog: EvaluatedDialog | None = None
    """The conversation before the response, if the input is one."""

    @property
    def length(self) -> str:
        """Its length class, as `3 to 4 s`."""
        low = max(edge for edge in LENGTH_EDGES_S if edge <= self.duration_s)
        high = [edge for edge in LENGTH_EDGES_S if edge > low]
        return f"{low} to {high[0]} s" if high else f"over {low} s"

    def pair(self) -> Pair:
        """What metrics take."""
        loss = {} if self.loss is None else asdict(self.loss)
        return Pair(self.text or "", self.pred_text, **loss)

    def row(self, normalizer: str | bool | None) -> dict[str, Any]:
        """Its row of the output manifest: NeMo's keys, raw texts, optional fields."""
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
        row |= {name: value for name, value in named.items() if value is not None}
        row |= {} if self.loss is None else asdict(self.loss)
        row |= {"controls": dict(self.controls)} if self.controls else {}
        seen = {"seen_text": self.is_seen_text, "seen_audio": self.is_seen_audio}
        row |= {name: True for name, is_seen in seen.items() if is_seen}
        if self.dialog is None or self.error is not None:
            return row
        return row | self.dialog.with_response(self.pred_text)


@dataclass(frozen=True, kw_only=True)
class ScoredResponse:
    """A response with a reference, both normalised."""

    response: Response
    merges_compounds: bool = False
    """Whether words that differ only in spaces are no error (`word_errors`)."""
    text: str
    pred_text: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of audio per second of generation (RTFx), without reading audio."""

    audio_s: float = 0.0
    generate_s: float = 0.0
    warm_audio_s: float = 0.0
    """Audio of the batches in which no program was compiled."""
    warm_generate_s: float = 0.0
    compiled: int = 0
    """Programs compiled, or loaded from the persistent compilation cache."""
    drafted: int = 0
    """Draft tokens that were checked."""
    accepted: int = 0
    """Draft tokens that are part of the responses."""

    def add_drafts(self, drafted: int, accepted: int) -> "Speed":
        """Adds the draft tokens of a batch."""
        return replace(self, drafted=self.drafted + drafted, accepted=self.accepted + accepted)

    def add(self, audio_s: float, generate_s: float, *, compiled: int) -> "Speed":
        """Adds a batch and the number of programs compiled for it."""
        return replace(
            self,
            compiled=self.compiled + compiled,
            audio_s=self.audio_s + audio_s,
            generate_s=self.generate_s + generate_s,
            warm_audio_s=self.warm_audio_s + (0.0 if compiled else audio_s),
            warm_generate_s=self.warm_generate_s + (0.0 if compiled else generate_s),
        )

    @property
    def rtfx(self) -> float | None:
        """RTFx over all batches, compilation included."""
        return self.audio_s / self.generate_s if self.generate_s else None

    @property
    def rtfx_warm(self) -> float | None:
        """RTFx over the batches without compilation; None if there are none."""
        return self.warm_audio_s / self.warm_generate_s if self.warm_generate_s else None


def sum_of(speeds: Iterable[Speed]) -> Speed:
    """The speed of evaluations one after another."""
    return Speed(**{name: sum(values) for name, values in _by_field(speeds).items()})


def at_once(speeds: Iterable[Speed]) -> Speed:
    """The speed of evaluations at the same time: the longest time counts, the rest adds up."""
    seconds = ("generate_s", "warm_generate_s")
    return Speed(**{n: (max if n in seconds else sum)(v) for n, v in _by_field(speeds).items()})


def _by_field(speeds: Iterable[Speed]) -> dict[str, Any]:
    each = list(speeds)
    return {f.name: [getattr(s, f.name) for s in each] for f in fields(Speed)}


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """The training data in which references and recordings were looked up."""

    rows: int
    unread: tuple[str, ...] = ()
    """Manifests and sources that could not be read."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Responses in input order, and the speed."""

    responses: tuple[Response, ...]
    speed: Speed
    normalizer: str | bool | None = "english"
    metrics: tuple[str, ...] = ("wer",)
    """Names of TASK_METRICS."""
    training: TrainingSummary | None = None
    """What was searched for the references and recordings; None if the training is not known."""
    seeds: Mapping[str, Mapping[str, Pair]] = field(default_factory=dict)
    """Responses by id of evaluations of the same training with other seeds, by their names."""

    def with_encoder_texts(self, texts: Sequence[str | None]) -> "Evaluation":
        """Adds the transcripts of the encoder's CTC head, in input order."""
        pairs = zip(self.responses, texts, strict=True)
        return replace(self, responses=tuple(replace(a, encoder_text=t) for a, t in pairs))

    def with_control(self, name: str, texts: Mapping[int, str]) -> "Evaluation":
        """Adds the responses of a control by index of the input."""
        responses = [
            replace(a, controls={**a.controls, name: texts[i]}) if i in texts else a
            for i, a in enumerate(self.responses)
        ]
        return replace(self, responses=tuple(responses))

    def with_losses(self, losses: Sequence[ResponseLoss | None]) -> "Evaluation":
        """Adds the losses of the references, in input order."""
        pairs = zip(self.responses, losses, strict=True)
        return replace(self, responses=tuple(replace(a, loss=loss) for a, loss in pairs))

    def rows(self) -> list[dict[str, Any]]:
        """A row per utterance, in input order."""
        return [response.row(self.normalizer) for response in self.responses]

    def scored(self) -> list[ScoredResponse]:
        """The responses that have a reference and no error."""
        normalize = text_normalizer(self.normalizer)
        return [
            ScoredResponse(
                response=a,
                text=normalize(a.text),
                pred_text=normalize(a.pred_text),
                merges_compounds=merges_compounds(self.normalizer),
            )
            for a in self.responses
            if a.text is not None and a.error is None
        ]

    def word_errors(self) -> WordErrors:
        """Word errors over the utterances that have a reference and a response."""
        return _errors(self.scored())

    def encoder_errors(self) -> WordErrors | None:
        """Word errors of the encoder's CTC head on these utterances; None without `encoder_wer`."""
        normalize = text_normalizer(self.normalizer)
        pairs = [(s.text, s.response.encoder_text) for s in self.scored()]
        scored = [(text, normalize(other)) for text, other in pairs if other is not None]
        if not scored:
            return None
        return word_errors(
            [text for text, _ in scored],
            [other for _, other in scored],
            merge_compounds=merges_compounds(self.normalizer),
        )

    def task_scores(self) -> dict[str, dict[str, Any]]:
        """Each metric with its 95 % interval."""
        pairs = [s.response.pair() for s in self.scored()]
        found = {}
        for name in self.metrics:
            metric = TASK_METRICS[name]
            score = estimate(metric, pairs, self.normalizer)
            details = metric.details(pairs, self.normalizer)
            details = {key: round(value, 2) for key, value in details.items()}
            found[name] = {"title": metric.title, **asdict(score), "details": details}
        return found

    def comparisons(self) -> dict[str, dict[str, Any]]:
        """The model beside its encoder (WER) and its controls (the main metric), where these are.

        See `comparisons.compared`.
        """
        scored = self.scored()
        pairs, main = [s.response.pair() for s in scored], main_metric(self.metrics)
        others = {ENCODER: (WER, [s.response.encoder_text for s in scored])}
        others |= {
            name: (main, [s.response.controls.get(name) for s in scored]) for name in CONTROLS
        }
        found = {n: compared(m, pairs, texts, self.normalizer) for n, (m, texts) in others.items()}
        return {name: one for name, one in found.items() if one is not None}

    def seed_scores(self) -> dict[str, Any] | None:
        """The main metric of this and the other seeds, over what all have; None without others."""
        if not self.seeds:
            return None
        own = {s.response.id: s.response.pair() for s in self.scored()}
        common = [i for i in own if all(i in other for other in self.seeds.values())]
        each = {THIS_SEED: own, **self.seeds}
        chosen = {name: {i: pairs[i] for i in common} for name, pairs in each.items()}
        return seed_scores(chosen, self.metrics, self.normalizer)

    def in_training(self) -> dict[str, Any] | None:
        """How many references and recordings the training has too, and the WER with and without.

        None if nothing of the training could be read.
        """
        if self.training is None:
            return None
        scored = self.scored()
        seen = [s for s in scored if s.response.is_seen_text]
        new = [s for s in scored if not s.response.is_seen_text]
        return {
            **asdict(self.training),
            "texts": len(seen),
            "recordings": sum(a.is_seen_audio for a in self.responses),
            "seen_texts": _errors(seen).plain() if seen else None,
            "new_texts": _errors(new).plain() if new else None,
        }

    def hallucinated(self) -> float | None:
        """Characters of the responses to recordings without words, per minute; None without such.

        These have an empty reference: silence, noise, music. One that only the normaliser makes
        empty ("Uh.") has words.
        """
        wordless = [s.response for s in self.scored() if not (s.response.text or "").strip()]
        minutes = sum(response.duration_s for response in wordless) / 60
        if not minutes:
            return None
        return sum(len(response.pred_text.strip()) for response in wordless) / minutes

    def totals(self) -> dict[str, Any]:
        """All numbers of the table."""
        scored = self.scored()
        errors = _errors(scored)
        encoder = self.encoder_errors()
        failed = Counter(a.cause or "unknown" for a in self.responses if a.error is not None)
        voices = _by(scored, lambda s: s.response.voice)
        unseen = [s for s in scored if s.response.is_unseen]
        found: dict[str, Any] = {
            "utterances": len(self.responses),
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
            "unseen_voices": sorted({str(s.response.voice) for s in unseen}),
            "unseen": _errors(unseen).plain() if unseen else None,
            "by_length": _by_length(scored),
            "encoder": None if encoder is None else encoder.plain(),
            "metrics": self.task_scores(),
            "comparisons": self.comparisons(),
            "training": self.in_training(),
            "seeds": self.seed_scores(),
            "hallucinated": self.hallucinated(),
            "audio_is_swapped": any(a.audio_of is not None for a in self.responses),
            "rtfx": self.speed.rtfx,
            "rtfx_without_warm_up": self.speed.rtfx_warm,
            "draft_tokens": self.speed.drafted,
            "accepted_draft_tokens": self.speed.accepted,
        }
        return {**found, "verdict": [sentence._asdict() for sentence in verdict(found)]}


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> None:
    """Writes the rows in order, then `{"provenance": ...}`. The file is replaced atomically."""
    lines = [json.dumps(row, ensure_ascii=False) for row in (*rows, {"provenance": provenance})]
    write_whole(path, "".join(f"{line}\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)


def _errors(scored: Sequence[ScoredResponse]) -> WordErrors:
    return word_errors(
        [s.text for s in scored],
        [s.pred_text for s in scored],
        merge_compounds=any(s.merges_compounds for s in scored),
    )


def _by(
    scored: Sequence[ScoredResponse], name: Callable[[ScoredResponse], str | None]
) -> dict[str, WordErrors]:
    """Word errors grouped by `name`; responses whose name is None are left out."""
    groups: dict[str, list[ScoredResponse]] = {}
    for one in scored:
        if (key := name(one)) is not None:
            groups.setdefault(key, []).append(one)
    return {key: _errors(group) for key, group in groups.items()}


def _by_length(scored: Sequence[ScoredResponse]) -> dict[str, dict[str, Any]]:
    in_order = sorted(scored, key=lambda s: s.response.duration_s)
    return {name: e.plain() for name, e in _by(in_order, lambda s: s.response.length).items()}
