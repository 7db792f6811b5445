"""One data set of a SALM: lengths, bucket shapes and batches of its conversations."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import BatchShape, FrameCount
from speechlm2_jax.data.bins import bin_of
from speechlm2_jax.data.bucketing import Measures, Members, samples_unit
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioTurn, Conversation
from speechlm2_jax.data.prompts import OUTPUT_ROLE
from speechlm2_jax.data.salm_examples import SalmExamples
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import SettingsError

CLIP_SPREAD = 2.0
"""Clips per group are planned for the mean plus so many standard deviations, or plus those of one
conversation."""
_LONGEST_UNIT = 64
"""The longest conversation of packed rows is known to so many positions, as attention needs it."""


@dataclass(frozen=True, kw_only=True)
class SalmContents(SalmExamples):
    """Conversations with token ids (implements `prepare.Contents`)."""

    conversations: Sequence[Conversation]
    measures: Measures

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
            "tokens_per_token": lambda i: _ratio_is_within(
                has[i], config.min_tpt, config.largest_tpt
            ),
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
        return salm_columns(shape, self.config.sample_rate)

    def validation_error(self, planned: Sequence[int]) -> None:
        """None: what passed the tests can be trained on."""

    def name(self, index: int) -> str:
        """The id of a conversation, for messages."""
        return self.conversations[index].id

    def _conversation(self, index: int) -> Conversation:
        return self.conversations[index]

    def _placeholders(self, conversation: Conversation) -> int:
        assert conversation.prompt is not None
        return int((conversation.prompt.input_ids == self.placeholder_id).sum())


def measure(
    conversations: Sequence[Conversation],
    *,
    frame_count: FrameCount,
    config: DataLoaderConfig,
) -> Measures:
    """Measures conversations that have prompts."""
    samples = [[clip.samples(config.sample_rate) for clip in c.clips] for c in conversations]
    frames = {n: frame_count(n) for n in {n for clips in samples for n in clips}}
    ids = [c.prompt.input_ids if c.prompt else np.zeros(0, np.int32) for c in conversations]
    positions = [
        # each placeholder is replaced by its clip's frames; the last token is a label alone
        len(tokens) - len(clips) + sum(frames[n] for n in clips) - 1
        for tokens, clips in zip(ids, samples, strict=True)
    ]
    lengths = [c.lengths for c in conversations]
    inputs = np.asarray([one.input_tokens for one in lengths], np.int64)
    outputs = np.asarray([one.output_tokens for one in lengths], np.int64)
    totals = np.asarray([one.total_tokens for one in lengths], np.int64)
    return Measures(
        length=totals if config.measure_total_length else inputs,
        positions=np.asarray(positions, np.int64).reshape(-1),
        clips=np.asarray([len(clips) for clips in samples], np.int64).reshape(-1),
        samples=np.asarray([max(clips, default=0) for clips in samples], np.int64).reshape(-1),
        bins=bin_of(config, inputs, outputs) if config.has_2d_bins else None,
    )


def salm_shape(members: Members, sample_rate_hz: int) -> BatchShape:
    """The shape of a bucket that can also hold each conversation of the shorter ones."""
    rows, unit = members.rows, samples_unit(sample_rate_hz)
    spread = math.sqrt(rows) * members.clips_std
    # with room for one more conversation every order can be spread over groups (clip_spreading)
    room = max(CLIP_SPREAD * spread, members.most_clips_up_to)
    usual = math.ceil(rows * members.clips_mean + room)
    clips = max(min(rows * members.most_clips_up_to, usual), 1)
    longest = -(-(members.most_positions or members.tokens) // _LONGEST_UNIT) * _LONGEST_UNIT
    return BatchShape(
        sequences=rows,
        tokens=members.tokens,
        clips=clips if members.packed_clips is None else members.packed_clips,
        samples=max(-(-members.samples_up_to // unit), 1) * unit,
        longest=longest if longest < members.tokens else None,
    )


def salm_columns(shape: BatchShape, sample_rate_hz: int) -> dict[str, str]:
    """More columns of a plan's table: clips, and seconds of the longest."""
    return {"clips": f"{shape.clips}", "seconds": f"{shape.samples / sample_rate_hz:.2f}"}


def placeholder_id(conversations: Sequence[Conversation], tokenizer: Tokenizer, where: str) -> int:
    """The id that stands for audio; -1, which no text has, where there is no audio."""
    return placeholder_of(locator_tags_of(conversations), tokenizer, where)


def placeholder_of(tags: Collection[str], tokenizer: Tokenizer, where: str) -> int:
    """The id of the tag that stands for audio; -1 where there is none.

    Raises SettingsError for several tags, TokenizerError for one that is no token.
    """
    if len(tags) > 1:
        raise SettingsError(
            f"{where}: audio_locator_tag: expected one tag for all entries, got {sorted(tags)}"
        )
    for tag in tags:
        return tokenizer.require(tag, f"{where}: audio_locator_tag")
    return -1


def placeholder_or_none(tags: Collection[str], tokenizer: Tokenizer) -> int:
    """The same; -1 also where it is an error, which is told later."""
    try:
        return placeholder_of(tags, tokenizer, "")
    except SettingsError:
        return -1


def locator_tags_of(conversations: Sequence[Conversation]) -> set[str]:
    """The tags that stand for the recordings of conversations."""
    turns = (turn for conversation in conversations for turn in conversation.turns)
    return {turn.locator_tag for turn in turns if isinstance(turn, AudioTurn)}


def _ratio_is_within(conversation: Conversation, least: float, most: float) -> bool:
    prompt = conversation.prompt
    if prompt is None or prompt.answer_ids is None or (least <= 0 and most == math.inf):
        return True
    return least <= len(prompt.answer_ids) / max(len(prompt.context_ids), 1) <= most
