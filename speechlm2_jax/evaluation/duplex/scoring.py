"""Scores of a duplex model's answers to whole conversations."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.batches import DuplexExample, HostBatch
from speechlm2_jax.evaluation.duplex.silence import without_long_silence
from speechlm2_jax.evaluation.metrics.asr_bleu import ASRBLEU
from speechlm2_jax.evaluation.metrics.bleu import BLEU, EmptyTextRate
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenAccuracy, TokenCounts, count_tokens
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, TurnTaking
from speechlm2_jax.models.asr import ASRModel
from speechlm2_jax.models.duplex import DuplexS2SModel

FIRST_SAID_FRAME = 1
"""A model says its first token when it has heard the first frame."""


@dataclass(frozen=True, kw_only=True)
class DuplexResponse:
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
    counts: TokenCounts | None = None
    """Its right tokens, where they were counted."""


@dataclass(frozen=True, kw_only=True)
class EarlierAnswer:
    """What scores depend on of a conversation."""

    reference: str | None
    """What the agent should say; None where that is not known."""
    text: str
    heard: str | None
    user: Turns
    agent: Turns
    counts: TokenCounts | None


@dataclass
class DuplexScorer:
    """Answers conversations and scores the answers, per set: text, speech, turns and tokens."""

    model: DuplexS2SModel
    recogniser: ASRModel | None = None
    keeps_audio: bool = False
    """Make the agent's audio even where nothing listens to it."""
    counts_tokens: bool = False
    """Compare token by token too, for which the agent's recorded speech is encoded."""
    normalizer: str | bool | None = "english"

    def __post_init__(self) -> None:
        self.text = BLEU(normalizer=self.normalizer)
        self.empty = EmptyTextRate()
        self.turns = TurnTaking()
        self.tokens = TokenAccuracy()
        self.speech = self._speech()

    def answer(self, name: str, examples: Sequence[DuplexExample]) -> list[DuplexResponse]:
        """Answers conversations of set `name` and adds them to its scores."""
        return self.add(name, examples, self.speak(examples))

    def speak(self, examples: Sequence[DuplexExample], rows: int = 0) -> dict[str, Any]:
        """Answers conversations, greedily; the batch is filled up to `rows` with empty ones."""
        rows = max(rows, len(examples))
        lengths = np.zeros(rows, np.int32)
        lengths[: len(examples)] = [len(e.source_audio) for e in examples]
        audio = np.zeros((rows, int(lengths.max(initial=1))), np.float32)
        for row, example in zip(audio, examples, strict=False):
            row[: len(example.source_audio)] = example.source_audio
        makes_audio = self.recogniser is not None or self.keeps_audio
        return self.model.offline_inference(audio, lengths, makes_audio)

    def add(
        self,
        name: str,
        examples: Sequence[DuplexExample],
        result: Mapping[str, Any],
        *,
        has_references: bool = True,
    ) -> list[DuplexResponse]:
        """Scores what `speak` said in conversations of set `name`.

        Without references nothing but empty answers is counted, and the speech is heard all the
        same.
        """
        count = len(examples)
        heard = self._listen(name, examples, result, has_references=has_references)
        answers = [_answer(result, row, examples[row], heard[row]) for row in range(count)]
        references = [example.target_text for example in examples]
        texts = [answer.text for answer in answers]
        self.empty.update(name, references, texts)
        if not has_references:
            return answers
        self.text.update(name, references, texts)
        for answer in answers:
            self.turns.update(name, *self.turns_of(answer))
        return self._with_counts(name, answers) if self.counts_tokens else answers

    def add_earlier(self, name: str, earlier: "EarlierAnswer") -> None:
        """Adds the scores of a conversation of set `name` that an earlier process answered."""
        reference = earlier.reference or ""
        self.empty.update(name, [reference], [earlier.text])
        if earlier.reference is None:
            return
        self.text.update(name, [reference], [earlier.text])
        if self.speech is not None and earlier.heard is not None:
            self.speech.update_texts(name, [reference], [earlier.heard])
        self.turns.update(name, earlier.user, earlier.agent)
        if earlier.counts is not None:
            self.tokens.update(name, earlier.counts)

    def compute(self) -> dict[str, float]:
        """All scores by name."""
        parts = (self.text, self.speech, self.empty, self.tokens, self.turns)
        return {k: v for part in parts if part is not None for k, v in part.compute().items()}

    def close(self) -> None:
        """Lets go of the scoring ASR; its scores stay."""
        self.recogniser = None
        if self.speech is not None:
            self.speech.release()

    def turns_of(self, answer: DuplexResponse) -> tuple[Turns, Turns]:
        """When the user and the agent speak."""
        ids, frame_s = self.model.turn_ids, self.model.token_equivalent_duration
        marks = {"bos_id": ids.bos, "eos_id": ids.eos, "frame_s": frame_s}
        return (
            Turns.from_tokens(answer.example.source_tokens, **marks),
            Turns.from_tokens(answer.tokens, **marks, first_frame=FIRST_SAID_FRAME),
        )

    def _with_counts(self, name: str, answers: Sequence[DuplexResponse]) -> list[DuplexResponse]:
        """Counts the right tokens of each answer, and those that were due."""
        due = self.model.targets([answer.example for answer in answers])
        counted = []
        for row, answer in enumerate(answers):
            frames = int(due.frames[row])
            counts = count_tokens(
                *(due.text[row, :frames], due.codes[row, :frames]),
                *(answer.tokens[:frames], answer.codes[:frames]),
                pad_id=self.model.text_pad_id,
                bos=self.model.speech_bos_id,
                eos=self.model.speech_eos_id,
            )
            self.tokens.update(name, counts)
            counted.append(replace(answer, counts=counts))
        return counted

    def _speech(self) -> ASRBLEU | None:
        if self.recogniser is None:
            return None
        return ASRBLEU(self.recogniser, normalizer=self.normalizer)

    def _listen(
        self,
        name: str,
        examples: Sequence[DuplexExample],
        result: Mapping[str, Any],
        *,
        has_references: bool,
    ) -> list[str | None]:
        """What the scoring ASR hears of each answer."""
        if self.speech is None:
            return [None] * len(examples)
        # without references the scores that come with the hearing are not kept
        speech = self.speech if has_references else self._speech()
        assert speech is not None
        rate_hz = self.model.target_sampling_rate
        lengths = np.asarray(result["audio_len"])[: len(examples)]
        rows = zip(np.asarray(result["audio"]), lengths, strict=False)
        spoken = [row[:length] for row, length in rows]
        if not self.model.nemo_exact:
            spoken = [without_long_silence(wave, rate_hz) for wave in spoken]
        audio = np.zeros((len(spoken), max(map(len, spoken), default=0)), np.float32)
        for row, wave in zip(audio, spoken, strict=True):
            row[: len(wave)] = wave
        heard = speech.update(
            name,
            [example.target_text for example in examples],
            audio,
            [len(wave) for wave in spoken],
            sample_rate_hz=rate_hz,
        )
        return list(heard)


def open_scorer(
    model: DuplexS2SModel, scoring_asr: str | Path | None, **options: Any
) -> DuplexScorer:
    """A scorer with the ASR model of that name or file, None: without; to be closed after use.

    `options` are further fields of the scorer.
    """
    recogniser = None if scoring_asr is None else ASRModel.from_pretrained(scoring_asr)
    return DuplexScorer(model=model, recogniser=recogniser, **options)


@contextmanager
def scoring(model: DuplexS2SModel, scoring_asr: str | Path | None) -> Generator[DuplexScorer]:
    """The same, closed afterwards."""
    with closing(open_scorer(model, scoring_asr)) as scorer:
        yield scorer


def conversations(batch: HostBatch) -> list[DuplexExample]:
    """The conversations behind a batch."""
    return [reference for reference in batch.references if reference is not None]


def _answer(
    result: Mapping[str, Any], row: int, example: DuplexExample, heard: str | None
) -> DuplexResponse:
    frames = int(result["tokens_len"][row])
    samples = int(result["audio_len"][row]) if "audio" in result else 0
    return DuplexResponse(
        example=example,
        text=result["text"][row],
        heard=heard,
        tokens=result["tokens_text"][row, :frames],
        codes=result["tokens_audio"][row, :frames],
        audio=result["audio"][row, :samples] if samples else np.zeros(0, np.float32),
    )
