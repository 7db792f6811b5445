"""Generates and scores a duplex model's side of whole conversations."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax import processes
from speechlm2_jax.batches import DuplexExample, HostBatch
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.evaluation.duplex.silence import without_long_silence
from speechlm2_jax.evaluation.duplex.silent_agent import SilentAgent
from speechlm2_jax.evaluation.metrics.asr_bleu import ASRBLEU
from speechlm2_jax.evaluation.metrics.bleu import BLEU, EmptyTextRate
from speechlm2_jax.evaluation.metrics.error_rates import RightText
from speechlm2_jax.evaluation.metrics.full_duplex import FullDuplex, FullDuplexCounts
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenAccuracy, TokenCounts, count_tokens
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, TurnTaking
from speechlm2_jax.models.asr import ASRModel
from speechlm2_jax.models.duplex import DuplexS2SModel

FIRST_TOKEN_FRAME = 1
"""Frame of a model's first token: it is generated after the first input frame was encoded."""


@dataclass(frozen=True, kw_only=True)
class DuplexResponse:
    """What the model generated in one conversation."""

    example: DuplexExample
    text: str
    asr_text: str | None
    """Transcript of the speech by the scoring ASR model; None without one."""
    tokens: Int[np.ndarray, " T"]
    """The text channel."""
    codes: Int[np.ndarray, "T K"]
    """Audio codes of K codebooks."""
    audio: Float[np.ndarray, " A"]
    """Speech at the codec's rate; empty if it was not decoded."""
    counts: TokenCounts | None = None
    """Correct tokens, if they were counted."""


@dataclass(frozen=True, kw_only=True)
class SavedResponse:
    """A response of an interrupted evaluation, reduced to what the scores need."""

    reference: str | None
    """Reference of the agent's side; None if there is none."""
    text: str
    asr_text: str | None
    user: Turns
    agent: Turns
    counts: TokenCounts | None

    def plain(self) -> dict[str, Any]:
        """Its fields as JSON values, for `from_plain`."""
        return {
            "reference": self.reference,
            "text": self.text,
            "asr_text": self.asr_text,
            "user": self.user.segments(),
            "agent": self.agent.segments(),
            "counts": None if self.counts is None else asdict(self.counts),
        }

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "SavedResponse":
        """The response of `plain`."""
        counts = values["counts"]
        return SavedResponse(
            reference=values["reference"],
            text=values["text"],
            asr_text=values["asr_text"],
            user=Turns.from_segments(map(tuple, values["user"])),
            agent=Turns.from_segments(map(tuple, values["agent"])),
            counts=None if counts is None else TokenCounts(**counts),
        )


@dataclass
class DuplexScorer:
    """Generates responses and scores them per set: text, speech, turns and tokens."""

    model: DuplexS2SModel
    asr_model: ASRModel | None = None
    keeps_audio: bool = False
    """Decode the agent's audio even without a scoring ASR model."""
    counts_tokens: bool = False
    """Also compare tokens; this encodes the agent's recorded speech."""
    normalizer: str | bool | None = "english"

    def __post_init__(self) -> None:
        self.text = BLEU(normalizer=self.normalizer)
        self.right = RightText(normalizer=self.normalizer)
        self.empty = EmptyTextRate()
        self.turns, self.events = TurnTaking(), FullDuplex()
        self.tokens = TokenAccuracy()
        self.speech = self._speech_metric()
        self.silent = SilentAgent(self.normalizer, has_speech=self.speech is not None)
        self._own: list[tuple[str, SavedResponse]] = []

    def generate_and_score(
        self, name: str, examples: Sequence[DuplexExample]
    ) -> list[DuplexResponse]:
        """Generates responses to conversations of set `name` and adds them to its scores."""
        responses = self.add(name, examples, self.generate(examples))
        self._own.extend((name, self._saved(response)) for response in responses)
        return responses

    def gather(self) -> None:
        """Adds what `generate_and_score` has scored on other processes, which all call this."""
        own = json.dumps([(name, saved.plain()) for name, saved in self._own])
        for index, text in enumerate(processes.gather_texts(own)):
            if index != jax.process_index():
                for name, values in json.loads(text):
                    self.add_saved(name, SavedResponse.from_plain(values))

    def generate(self, examples: Sequence[DuplexExample], batch_size: int = 0) -> dict[str, Any]:
        """Greedy decoding; the batch is padded to `batch_size` with empty conversations."""
        waves = [example.source_audio for example in examples]
        audio, lengths = pad_right(waves, rows=max(batch_size, len(examples)))
        decodes_audio = self.asr_model is not None or self.keeps_audio
        return self.model.offline_inference(audio, lengths, decodes_audio)

    def add(
        self,
        name: str,
        examples: Sequence[DuplexExample],
        result: Mapping[str, Any],
        *,
        has_references: bool = True,
    ) -> list[DuplexResponse]:
        """Scores the output of `generate` for conversations of set `name`.

        Without references only empty responses are counted; the speech is still transcribed.
        """
        count = len(examples)
        asr_texts = self._transcribe(name, examples, result, has_references=has_references)
        responses = [_response(result, i, examples[i], asr_texts[i]) for i in range(count)]
        references = [example.target_text for example in examples]
        texts = [response.text for response in responses]
        self.empty.update(name, references, texts)
        if not has_references:
            return responses
        for response in responses:
            reference, (user, agent) = response.example.target_text, self.turns_of(response)
            self._add_texts_and_turns(name, (reference, response.text), user, agent)
        return self._with_counts(name, responses) if self.counts_tokens else responses

    def add_saved(self, name: str, saved: SavedResponse) -> None:
        """Adds a response of set `name` of an interrupted evaluation or of another process."""
        reference = saved.reference or ""
        self.empty.update(name, [reference], [saved.text])
        if saved.reference is None:
            return
        self._add_texts_and_turns(name, (reference, saved.text), saved.user, saved.agent)
        if self.speech is not None and saved.asr_text is not None:
            self.speech.update_texts(name, [reference], [saved.asr_text])
        if saved.counts is not None:
            self.tokens.update(name, saved.counts)

    def add_events(self, name: str, counts: FullDuplexCounts | None) -> None:
        """Adds the events of a conversation of set `name`, if they were counted."""
        if counts is not None:
            self.events.update(name, counts)
            self.silent.add_events(name, counts)

    def _add_texts_and_turns(
        self, name: str, texts: tuple[str, str], user: Turns, agent: Turns
    ) -> None:
        """Adds reference and text of a response, and the turns of its conversation."""
        reference, text = texts
        self.text.update(name, [reference], [text])
        self.right.update(name, [reference], [text])
        self.turns.update(name, user, agent)
        self.silent.update(name, reference, user)

    def compute(self) -> dict[str, float]:
        """All scores by name."""
        metrics = (
            *(self.text, self.right, self.speech, self.empty),
            *(self.tokens, self.turns, self.events),
        )
        return {
            k: v for metric in metrics if metric is not None for k, v in metric.compute().items()
        }

    def close(self) -> None:
        """Frees the scoring ASR model; its scores stay."""
        self.asr_model = None
        if self.speech is not None:
            self.speech.release()

    def turns_of(self, response: DuplexResponse) -> tuple[Turns, Turns]:
        """The turns of user and agent."""
        ids, frame_s = self.model.turn_ids, self.model.token_equivalent_duration
        marks = {"bos_id": ids.bos, "eos_id": ids.eos, "frame_s": frame_s}
        return (
            Turns.from_tokens(response.example.source_tokens, **marks),
            Turns.from_tokens(response.tokens, **marks, first_frame=FIRST_TOKEN_FRAME),
        )

    def _saved(self, response: DuplexResponse) -> SavedResponse:
        user, agent = self.turns_of(response)
        return SavedResponse(
            reference=response.example.target_text,
            text=response.text,
            asr_text=response.asr_text,
            user=user,
            agent=agent,
            counts=response.counts,
        )

    def _with_counts(self, name: str, responses: Sequence[DuplexResponse]) -> list[DuplexResponse]:
        """Counts the target tokens of each response, and those that it predicts correctly."""
        targets = self.model.targets([response.example for response in responses])
        counted = []
        for i, response in enumerate(responses):
            frames = int(targets.frames[i])
            counts = count_tokens(
                *(targets.text[i, :frames], targets.codes[i, :frames]),
                *(response.tokens[:frames], response.codes[:frames]),
                pad_id=self.model.text_pad_id,
                bos=self.model.speech_bos_id,
                eos=self.model.speech_eos_id,
            )
            self.tokens.update(name, counts)
            counted.append(replace(response, counts=counts))
        return counted

    def _speech_metric(self) -> ASRBLEU | None:
        if self.asr_model is None:
            return None
        return ASRBLEU(self.asr_model, normalizer=self.normalizer)

    def _transcribe(
        self,
        name: str,
        examples: Sequence[DuplexExample],
        result: Mapping[str, Any],
        *,
        has_references: bool,
    ) -> list[str | None]:
        """The scoring ASR model's transcript of each response."""
        if self.speech is None:
            return [None] * len(examples)
        # without references the transcripts are kept, and their scores are dropped
        speech = self.speech if has_references else self._speech_metric()
        assert speech is not None
        rate_hz = self.model.target_sampling_rate
        lengths = np.asarray(result["audio_len"])[: len(examples)]
        padded = zip(np.asarray(result["audio"]), lengths, strict=False)
        waves = [wave[:length] for wave, length in padded]
        if not self.model.nemo_exact:
            waves = [without_long_silence(wave, rate_hz) for wave in waves]
        audio, lengths = pad_right(waves)
        texts = speech.update(
            name,
            [example.target_text for example in examples],
            audio,
            lengths,
            sample_rate_hz=rate_hz,
        )
        return list(texts)


def open_scorer(
    model: DuplexS2SModel, scoring_asr: str | Path | None, **options: Any
) -> DuplexScorer:
    """A scorer with the ASR model of a name or file, or without one (None). Close it after use.

    `options` are further fields of DuplexScorer.
    """
    asr_model = None if scoring_asr is None else ASRModel.from_pretrained(scoring_asr)
    return DuplexScorer(model=model, asr_model=asr_model, **options)


@contextmanager
def scoring(model: DuplexS2SModel, scoring_asr: str | Path | None) -> Generator[DuplexScorer]:
    """`open_scorer` as a context manager."""
    with closing(open_scorer(model, scoring_asr)) as scorer:
        yield scorer


def conversations(batch: HostBatch) -> list[DuplexExample]:
    """The conversations that a batch was made of."""
    return [reference for reference in batch.references if reference is not None]


def _response(
    result: Mapping[str, Any], i: int, example: DuplexExample, asr_text: str | None
) -> DuplexResponse:
    """Sequence `i` of a batch that `offline_inference` returned, without padding."""
    frames = int(result["tokens_len"][i])
    samples = int(result["audio_len"][i]) if "audio" in result else 0
    return DuplexResponse(
        example=example,
        text=result["text"][i],
        asr_text=asr_text,
        tokens=result["tokens_text"][i, :frames],
        codes=result["tokens_audio"][i, :frames],
        audio=result["audio"][i, :samples] if samples else np.zeros(0, np.float32),
    )
