"""Scores of a duplex model's answers to whole conversations."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speechlm2_jax.batches import DuplexExample, HostBatch
from speechlm2_jax.evaluation.asr_bleu import ASRBLEU
from speechlm2_jax.evaluation.bleu import BLEU, EmptyTextRate
from speechlm2_jax.evaluation.turn_taking import Turns, TurnTaking
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.models.recogniser import ASRModel


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said in one conversation."""

    example: DuplexExample
    text: str
    heard: str | None
    """What the scoring ASR heard of the speech; None without one."""
    tokens: np.ndarray
    """Int32 [T]: the text channel."""
    codes: np.ndarray
    """Int32 [T, K]."""
    audio: np.ndarray
    """Float32 [A] at the codec's rate; empty if it was not made."""


@dataclass
class DuplexScorer:
    """Answers conversations and scores the answers, per set: text, speech and turns."""

    model: DuplexS2SModel
    recogniser: ASRModel | None = None
    keeps_audio: bool = False
    """Make the agent's audio even where nothing listens to it."""
    text: BLEU = field(default_factory=BLEU)
    empty: EmptyTextRate = field(default_factory=EmptyTextRate)
    turns: TurnTaking = field(default_factory=TurnTaking)

    def __post_init__(self) -> None:
        self.speech = None if self.recogniser is None else ASRBLEU(self.recogniser)

    def answer(self, name: str, examples: Sequence[DuplexExample]) -> list[Answer]:
        """Answers conversations of set `name` and adds them to its scores."""
        lengths = np.array([len(e.source_audio) for e in examples], np.int32)
        audio = np.zeros((len(examples), int(lengths.max(initial=1))), np.float32)
        for row, example in zip(audio, examples, strict=True):
            row[: len(example.source_audio)] = example.source_audio
        is_heard = self.speech is not None
        result = self.model.offline_inference(audio, lengths, is_heard or self.keeps_audio)
        references = [example.target_text for example in examples]
        self.text.update(name, references, result["text"])
        self.empty.update(name, references, result["text"])
        heard: Sequence[str | None] = [None] * len(examples)
        if self.speech is not None:
            heard = self.speech.update(
                *(name, references, result["audio"], result["audio_len"]),
                sample_rate_hz=self.model.target_sampling_rate,
            )
        answers = [
            _answer(result, row, example, heard[row]) for row, example in enumerate(examples)
        ]
        for answer in answers:
            self._add_turns(name, answer)
        return answers

    def compute(self) -> dict[str, float]:
        """All scores by name."""
        parts = (self.text, self.empty, self.turns, self.speech)
        return {k: v for part in parts if part is not None for k, v in part.compute().items()}

    def _add_turns(self, name: str, answer: Answer) -> None:
        ids = self.model.turn_ids
        user, agent = (
            Turns.from_tokens(
                channel,
                bos_id=ids.bos,
                eos_id=ids.eos,
                frame_s=self.model.token_equivalent_duration,
            )
            for channel in (answer.example.source_tokens, answer.tokens)
        )
        self.turns.update(name, user, agent)


@contextmanager
def scoring(model: DuplexS2SModel, scoring_asr: Any) -> Generator[DuplexScorer]:
    """A scorer with the ASR model of that name, which is let go of afterwards; None: without."""
    recogniser = None if scoring_asr is None else ASRModel.from_pretrained(scoring_asr)
    yield DuplexScorer(model=model, recogniser=recogniser)


def conversations(batch: HostBatch) -> list[DuplexExample]:
    """The conversations behind a batch."""
    return [reference for reference in batch.references if reference is not None]


def _answer(result: dict[str, Any], row: int, example: DuplexExample, heard: str | None) -> Answer:
    frames = int(result["tokens_len"][row])
    samples = int(result["audio_len"][row]) if "audio" in result else 0
    return Answer(
        example=example,
        text=result["text"][row],
        heard=heard,
        tokens=result["tokens_text"][row, :frames],
        codes=result["tokens_audio"][row, :frames],
        audio=result["audio"][row, :samples] if samples else np.zeros(0, np.float32),
    )
