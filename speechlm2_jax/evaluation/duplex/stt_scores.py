"""Scores of a duplex speech-to-text model in validation: texts of both sides, and turn taking."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from speechlm2_jax import processes
from speechlm2_jax.batches import DuplexExample
from speechlm2_jax.data.duplex.text_channel import channel_texts
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.evaluation.duplex.scoring import FIRST_TOKEN_FRAME
from speechlm2_jax.evaluation.metrics.bleu import BLEU, EmptyTextRate
from speechlm2_jax.evaluation.metrics.error_rates import WER
from speechlm2_jax.evaluation.metrics.text_metric import TextMetric
from speechlm2_jax.evaluation.metrics.turn_taking import FirstTurnAccuracy, Turns, TurnTaking
from speechlm2_jax.models.duplex_stt import DuplexSTTModel


@dataclass(frozen=True, kw_only=True)
class ScoredConversation:
    """What the scores need of one conversation."""

    id: str
    name: str
    """The validation set."""
    reference: str
    text: str
    user_reference: str
    user_text: str | None
    """None without a user-text head."""
    user_turns: Sequence[Sequence[float]]
    """(start, end) in seconds of the user's turns."""
    agent_turns: Sequence[Sequence[float]]
    channels: Sequence[Sequence[int]]
    """Text channels of user and agent, for NeMo's score of the first turn."""


@dataclass(frozen=True, kw_only=True)
class SttScorer:
    """Scores of whole validation sets.

    `txt_bleu`, `empty_text_rate` and turn taking of the agent; with a user-text head also
    `src_txt_bleu`, `src_wer` and `src_empty_text_rate` of the user's text.
    """

    model: DuplexSTTModel
    scored: list[ScoredConversation] = field(default_factory=list)

    def generate_and_score(
        self, name: str, examples: Sequence[DuplexExample]
    ) -> list[ScoredConversation]:
        """Generates responses to conversations of set `name` and adds them to its scores."""
        scored = self._generate(name, examples)
        self.scored.extend(scored)
        return scored

    def gather(self) -> None:
        """Adds the responses of the other processes."""
        own = json.dumps([asdict(one) for one in self.scored])
        for index, text in enumerate(processes.gather_texts(own)):
            if index != jax.process_index():
                self.scored.extend(ScoredConversation(**one) for one in json.loads(text))

    def compute(self) -> dict[str, float]:
        """All scores, per set and over sets."""
        agent: list[TextMetric] = [BLEU(), EmptyTextRate()]
        user: list[TextMetric] = [
            BLEU(key="src_txt_bleu"),
            WER(key="src_wer"),
            EmptyTextRate(key="src_empty_text_rate"),
        ]
        ids, turns = self.model.turn_ids, TurnTaking()
        first = FirstTurnAccuracy(bos_id=ids.bos, eos_id=ids.eos)
        for one in self.scored:
            for metric in agent:
                metric.update(one.name, [one.reference], [one.text])
            if one.user_text is not None:
                for metric in user:
                    metric.update(one.name, [one.user_reference], [one.user_text])
            sides = (one.user_turns, one.agent_turns)
            turns.update(one.name, *map(_turns_of, sides))
            first.update(one.name, *([channel] for channel in one.channels))
        used = (*agent, *(user if self.model.predict_user_text else ()), turns, first)
        return {key: value for metric in used for key, value in metric.compute().items()}

    def _generate(self, name: str, examples: Sequence[DuplexExample]) -> list[ScoredConversation]:
        model = self.model
        audio, lengths = pad_right([example.source_audio for example in examples])
        prompts, prompt_lengths = pad_right(
            [example.prompt_tokens for example in examples], model.text_pad_id
        )
        result = model.offline_inference(
            audio, lengths, prompt_tokens=prompts, prompt_token_lens=prompt_lengths
        )
        frames = result["tokens_len"]
        texts = channel_texts(
            result["tokens_text"], frames, model.tokenizer, pad_id=model.text_pad_id
        )
        tokens = [ids[:n] for ids, n in zip(result["tokens_text"], frames, strict=True)]
        return [
            ScoredConversation(
                id=example.id,
                name=name,
                reference=example.target_text,
                text=texts[i],
                user_reference=example.source_text,
                user_text=result["src_text"][i] if model.predict_user_text else None,
                user_turns=self._turns(example.source_tokens, 0),
                agent_turns=self._turns(tokens[i], FIRST_TOKEN_FRAME),
                channels=[example.source_tokens.tolist(), tokens[i].tolist()],
            )
            for i, example in enumerate(examples)
        ]

    def _turns(self, tokens: Any, first_frame: int) -> list[tuple[float, float]]:
        ids = self.model.turn_ids
        turns = Turns.from_tokens(
            tokens,
            bos_id=ids.bos,
            eos_id=ids.eos,
            frame_s=self.model.token_equivalent_duration,
            first_frame=first_frame,
        )
        return turns.segments()


def _turns_of(segments: Sequence[Sequence[float]]) -> Turns:
    return Turns.from_segments((start, end) for start, end in segments)
