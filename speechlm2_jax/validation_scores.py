"""Scores of generated text in validation: word errors, metrics of responses, duplex scores."""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import jax
import numpy as np

from speechlm2_jax import processes
from speechlm2_jax.batches import HostBatch, SalmExample
from speechlm2_jax.evaluation.duplex import scoring
from speechlm2_jax.evaluation.duplex.stt_scores import SttScorer
from speechlm2_jax.evaluation.metrics.task_metrics import (
    PERPLEXITY,
    TASK_METRICS,
    Pair,
    check_metrics,
)
from speechlm2_jax.evaluation.metrics.text_metric import by_set
from speechlm2_jax.evaluation.metrics.wer import text_normalizer, word_errors
from speechlm2_jax.models.ctc import CTCModel
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.models.duplex_stt import DuplexSTTModel
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.protocol import HostMetric, Sample, Scored, Scoring

WER = "wer"
NORMALIZER = "basic"
MAX_NEW_TOKENS = 128


def validation_scores(
    model: object, names: Sequence[str] = (WER,)
) -> tuple[dict[str, HostMetric], Scoring | None]:
    """Metrics and scoring of a model's generated text; none for models of other packages.

    `names` are of TASK_METRICS (`trainer.validation_metrics`); duplex models have scores of their
    own. Raises SettingsError for an unknown name.
    """
    if isinstance(model, DuplexS2SModel):
        return {}, lambda: duplex_scores(model)
    if isinstance(model, DuplexSTTModel):
        return {}, lambda: nullcontext(SttScores(scorer=SttScorer(model=model)))
    if not isinstance(model, SALM | CTCModel):
        return {}, None
    try:
        check_metrics(names)
    except ValueError as error:
        raise SettingsError(f"trainer.validation_{error}") from error
    if PERPLEXITY in names and isinstance(model, CTCModel):
        raise SettingsError(
            f"trainer.validation_metrics: {PERPLEXITY} is of the tokens of an LLM, which a CTC "
            "model lacks; leave it out"
        )
    of_texts = tuple(name for name in names if name != PERPLEXITY)  # the validator has the loss
    if of_texts == (WER,):
        return {WER: word_error_rate(model)}, None
    if not of_texts:
        return {}, None
    return {}, lambda: nullcontext(ResponseScores(model=model, names=of_texts))


@contextmanager
def duplex_scores(model: DuplexS2SModel) -> Generator["ConversationScores"]:
    """Scores a duplex model's generated conversations in one validation."""
    with scoring.scoring(model, model.find_scoring_asr()) as scorer:
        yield ConversationScores(scorer)


@dataclass(frozen=True)
class ConversationScores:
    """Adapts a duplex scorer to `training.protocol.Scorer`."""

    scorer: scoring.DuplexScorer

    def update(self, name: str, batch: HostBatch) -> list[Sample]:
        """Generates and scores the responses of a batch of set `name`."""
        examples = scoring.conversations(batch)
        if not examples:
            return []
        return [
            Sample(id=a.example.id, reference=a.example.target_text, hypothesis=a.text)
            for a in self.scorer.generate_and_score(name, examples)
        ]

    def gather(self) -> None:
        """Adds the responses of the other processes."""
        self.scorer.gather()

    def compute(self) -> dict[str, float]:
        """All scores, per set and over sets."""
        return self.scorer.compute()


@dataclass(frozen=True, kw_only=True)
class SttScores:
    """Adapts the scorer of a duplex speech-to-text model to `training.protocol.Scorer`."""

    scorer: SttScorer

    def update(self, name: str, batch: HostBatch) -> list[Sample]:
        """Generates and scores the responses of a batch of set `name`."""
        examples = scoring.conversations(batch)
        if not examples:
            return []
        return [
            Sample(id=one.id, reference=one.reference, hypothesis=one.text)
            for one in self.scorer.generate_and_score(name, examples)
        ]

    def gather(self) -> None:
        """Adds the responses of the other processes."""
        self.scorer.gather()

    def compute(self) -> dict[str, float]:
        """All scores, per set and over sets."""
        return self.scorer.compute()


@dataclass(frozen=True, kw_only=True)
class ResponseScores:
    """Scores of the responses of whole validation sets; a `training.protocol.Scorer`.

    Shares (`wer`, `intent`, ...) are between 0 and 1, as `val_wer` is; BLEU and chrF are points.
    """

    model: SALM | CTCModel
    names: tuple[str, ...]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    """Set -> references and hypotheses."""

    def update(self, name: str, batch: HostBatch) -> list[Sample]:
        """Generates the responses of a batch of set `name`."""
        scored = [reference for reference in batch.references if reference is not None]
        texts = hypotheses(self.model, [reference.prompt for reference in scored]) if scored else []
        samples = [
            Sample(id=reference.id, reference=reference.text, hypothesis=text)
            for reference, text in zip(scored, texts, strict=True)
        ]
        self.pairs.setdefault(name, []).extend(Pair(s.reference, s.hypothesis) for s in samples)
        return samples

    def gather(self) -> None:
        """Adds the responses of the other processes."""
        texts = processes.gather_texts(json.dumps(self.pairs))
        for index, text in enumerate(texts):
            if index != jax.process_index():
                for name, pairs in json.loads(text).items():
                    self.pairs.setdefault(name, []).extend(Pair(*pair) for pair in pairs)

    def compute(self) -> dict[str, float]:
        """`METRIC_SET` of each set and `METRIC`, their mean; sets without references have none."""
        found: dict[str, float] = {}
        for name in self.names:
            metric = TASK_METRICS[name]
            sums = {
                one: metric.value(metric.matrix(pairs, NORMALIZER).sum(axis=0))
                for one, pairs in self.pairs.items()
                if pairs
            }
            unit = 100.0 if metric.is_share else 1.0
            found |= by_set(name, {s: v / unit for s, v in sums.items() if v is not None})
        return found


def word_error_rate(model: SALM | CTCModel) -> Callable[[HostBatch], Scored]:
    """Makes a validation metric: generates for each conversation and counts word errors.

    Texts are lower-cased and stripped of punctuation, in any language. The count is the number of
    reference words.
    """
    normalize = text_normalizer(NORMALIZER)

    def metric(batch: HostBatch) -> Scored:
        scored = [reference for reference in batch.references if reference is not None]
        if not scored:
            return Scored(total=0.0, count=0.0)
        texts = hypotheses(model, [reference.prompt for reference in scored])
        errors = word_errors(
            [normalize(reference.text) for reference in scored],
            [normalize(text) for text in texts],
        )
        return Scored(
            total=float(errors.errors),
            count=float(errors.reference_words),
            samples=tuple(
                Sample(id=reference.id, reference=reference.text, hypothesis=text)
                for reference, text in zip(scored, texts, strict=True)
            ),
        )

    return metric


def hypotheses(model: SALM | CTCModel, prompts: Sequence[SalmExample]) -> list[str]:
    """The generated text for each prompt; a CTC model transcribes the first recording only."""
    if isinstance(model, CTCModel):
        return [*model.transcribe([prompt.audio[0] for prompt in prompts])]
    return [text_before_end(model, i) for i in model.answer(prompts, MAX_NEW_TOKENS)]


def text_before_end(model: SALM, ids: np.ndarray) -> str:
    """The text of generated tokens up to the first end token."""
    ends = np.flatnonzero(np.isin(ids, model.end_ids))
    return model.tokenizer.ids_to_text(ids[: ends[0]] if len(ends) else ids)
