"""One data set of a SALM: lengths, bucket shapes and batches of its conversations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import (
    BatchShape,
    FrameCount,
    SalmBatch,
    SalmExample,
    assemble_salm_batch,
)
from speechlm2_jax.data.bucketing import Measures, Members, samples_unit
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioTurn, Conversation
from speechlm2_jax.data.prompts import OUTPUT_ROLE
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ExampleEffects
    from speechlm2_jax.data.salm_dataset import SALMDataset, SalmReference

CLIP_SPREAD = 2.0
"""Clips per group are planned for the mean plus so many standard deviations."""


@dataclass(frozen=True, kw_only=True)
class SalmContents:
    """Conversations with token ids (implements `prepare.Contents`)."""

    dataset: "SALMDataset"
    config: DataLoaderConfig
    conversations: Sequence[Conversation]
    measures: Measures
    frame_count: FrameCount
    placeholder_id: int
    """Stands for a recording; -1, which no text has, where there is none."""

    def tests(self) -> dict[str, Callable[[int], bool]]:
        """By cause: whether settings let the conversation of an index pass."""
        config, has = self.config, self.conversations
        least_tokens, most_tokens = config.min_tokens or 0, config.max_tokens or math.inf
        least_s, most_s = config.min_duration or 0.0, config.max_duration or math.inf
        length = self.measures.length.tolist()
        return {
            "no_response": lambda i: has[i].turns[-1].role == OUTPUT_ROLE,
            "placeholders": lambda i: self._placeholders(has[i]) == len(has[i].clips),
            "min_tokens": lambda i: length[i] >= least_tokens,
            "max_tokens": lambda i: length[i] <= most_tokens,
            "min_duration": lambda i: not has[i].clips or has[i].audio_duration_s >= least_s,
            "max_duration": lambda i: not has[i].clips or has[i].audio_duration_s <= most_s,
            "tokens_per_token": lambda i: _ratio_is_within(has[i], config.min_tpt, config.max_tpt),
        }

    def lengths(self) -> dict[str, np.ndarray]:
        """Seconds of each conversation's longest recording, and tokens of its text."""
        tokens = [0 if c.prompt is None else len(c.prompt.input_ids) for c in self.conversations]
        return {
            "seconds": self.measures.samples / self.config.sample_rate,
            "tokens": np.asarray(tokens, np.int64),
        }

    def take(self, index: Int[np.ndarray, " n"]) -> "SalmContents":
        """The same of some conversations."""
        chosen = tuple(self.conversations[i] for i in index.tolist())
        return replace(self, conversations=chosen, measures=self.measures.take(index))

    def shape(self, members: Members) -> BatchShape:
        """The shape of a bucket."""
        return salm_shape(members, self.config.sample_rate)

    def columns(self, shape: BatchShape) -> dict[str, str]:
        """Clips, and seconds of the longest."""
        seconds = shape.samples / self.config.sample_rate
        return {"clips": f"{shape.clips}", "seconds": f"{seconds:.2f}"}

    def validation_error(self, planned: Sequence[int]) -> None:
        """None: what passed the tests can be trained on."""

    def example(self, index: int, effects: "ExampleEffects | None" = None) -> SalmExample:
        """Reads a conversation's audio. Raises AudioError if any of it cannot be used."""
        return self.dataset.example(self.conversations[index], self.config.sample_rate, effects)

    def assemble(
        self, groups: Sequence[Sequence[SalmExample | None]], shape: BatchShape
    ) -> SalmBatch:
        """The arrays of groups of examples; None is an empty sequence."""
        return assemble_salm_batch(
            groups,
            shape,
            frame_count=self.frame_count,
            placeholder_id=self.placeholder_id,
        )

    def reference(self, index: int, example: SalmExample) -> "SalmReference":
        """The prompt of a conversation, with its audio, and the reference response."""
        return self.dataset.reference(self.conversations[index], example)

    def _placeholders(self, conversation: Conversation) -> int:
        assert conversation.prompt is not None
        return int((conversation.prompt.input_ids == self.placeholder_id).sum())


def measure(
    conversations: Sequence[Conversation],
    *,
    frame_count: FrameCount,
    sample_rate_hz: int,
    measure_total_length: bool,
) -> Measures:
    """Measures conversations that have prompts."""
    samples = [[clip.samples(sample_rate_hz) for clip in c.clips] for c in conversations]
    frames = {n: frame_count(n) for n in {n for clips in samples for n in clips}}
    ids = [c.prompt.input_ids if c.prompt else np.zeros(0, np.int32) for c in conversations]
    positions = [
        # each placeholder is replaced by its clip's frames; the last token is a label alone
        len(tokens) - len(clips) + sum(frames[n] for n in clips) - 1
        for tokens, clips in zip(ids, samples, strict=True)
    ]
    length = [
        c.lengths.total_tokens if measure_total_length else c.lengths.input_tokens
        for c in conversations
    ]
    return Measures(
        length=np.asarray(length, np.int64).reshape(-1),
        positions=np.asarray(positions, np.int64).reshape(-1),
        clips=np.asarray([len(clips) for clips in samples], np.int64).reshape(-1),
        samples=np.asarray([max(clips, default=0) for clips in samples], np.int64).reshape(-1),
    )


def salm_shape(members: Members, sample_rate_hz: int) -> BatchShape:
    """The shape of a bucket that can also hold each conversation of the shorter ones."""
    rows, clips, unit = members.rows, members.own.clips, samples_unit(sample_rate_hz)
    spread = math.sqrt(rows) * float(clips.std())
    usual = math.ceil(rows * float(clips.mean()) + CLIP_SPREAD * spread)
    most = int(members.up_to.clips.max())
    return BatchShape(
        sequences=rows,
        tokens=members.tokens,
        clips=max(min(rows * int(clips.max()), usual), most, 1),
        samples=max(-(-int(members.up_to.samples.max()) // unit), 1) * unit,
    )


def placeholder_id(conversations: Sequence[Conversation], tokenizer: Tokenizer, where: str) -> int:
    """The id that stands for audio; -1, which no text has, where there is no audio."""
    turns = (turn for conversation in conversations for turn in conversation.turns)
    tags = {turn.locator_tag for turn in turns if isinstance(turn, AudioTurn)}
    if len(tags) > 1:
        raise SettingsError(
            f"{where}: audio_locator_tag: expected one tag for all entries, got {sorted(tags)}"
        )
    for tag in tags:
        return tokenizer.require(tag, f"{where}: audio_locator_tag")
    return -1


def _ratio_is_within(conversation: Conversation, least: float, most: float) -> bool:
    prompt = conversation.prompt
    if prompt is None or prompt.answer_ids is None or (least <= 0 and most == math.inf):
        return True
    return least <= len(prompt.answer_ids) / max(len(prompt.context_ids), 1) <= most
