"""Joins the conversations of a group of a batch, within the shape that was planned for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from speechlm2_jax.batches import BatchShape, SalmExample
from speechlm2_jax.data.augmentation.augmentation import ExampleEffects
from speechlm2_jax.data.augmentation.concatenation import (
    Concatenation,
    context,
    joined_conversation,
)
from speechlm2_jax.data.config import DataLoaderConfig, LoaderConfig
from speechlm2_jax.data.prepare import BatchContents
from speechlm2_jax.data.salm_contents import SalmContents

Pair = tuple[int, SalmExample]
"""The index of a conversation, and its example."""
EffectsOf = Callable[[int], ExampleEffects | None]


@dataclass(frozen=True, kw_only=True)
class SalmConcatenation:
    """`concatenate_samples` of one data set."""

    contents: SalmContents
    how: Concatenation

    @classmethod
    def of(cls, contents: BatchContents, config: LoaderConfig) -> "SalmConcatenation | None":
        """That of a data set; None if nothing is joined."""
        if not isinstance(config, DataLoaderConfig) or not config.concatenate_samples:
            return None
        how = Concatenation(
            gap_s=config.concatenate_gap_seconds,
            duration_factor=config.concatenate_duration_factor,
            loudness_lufs=config.db_norm,
        )
        return cls(contents=cast(SalmContents, contents), how=how)

    def __call__(
        self, pairs: Sequence[Pair], shape: BatchShape, effects_of: EffectsOf
    ) -> list[Pair]:
        """Fewer and longer examples, whose effects come last, as in NeMo."""
        named, rate_hz = self.contents.conversations, self.contents.config.sample_rate
        groups: dict[object, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(context(named[pair[0]]) or pair[0], []).append(pair)
        lengths = [len(example.audio[0]) for _, example in pairs if len(example.audio) == 1]
        most = min(int(max(lengths, default=0) * self.how.duration_factor), shape.samples)
        joined: list[Pair] = []
        for members in groups.values():
            samples = [sum(map(len, example.audio)) for _, example in members]
            for numbers in self.how.joins(samples, rate_hz, most):
                joined += self._joined([members[n] for n in numbers], shape)
        return [
            (index, _finished(example, effects_of(index), rate_hz)) for index, example in joined
        ]

    def _joined(self, pairs: Sequence[Pair], shape: BatchShape) -> Sequence[Pair]:
        """One example of several; the same where their tokens do not fit the shape."""
        contents, rate_hz = self.contents, self.contents.config.sample_rate
        if len(pairs) == 1:
            return [(index, self._alone(example)) for index, example in pairs]
        dataset = contents.dataset
        one = joined_conversation([contents.conversations[index] for index, _ in pairs])
        name = contents.config.prompt_format or dataset.prompt_format
        prompt = dataset.encode([one], name)[0].prompt
        assert prompt is not None
        audio = self.how.sound([example.audio[0] for _, example in pairs], rate_hz)
        ids = prompt.input_ids
        # the placeholder is replaced by frames, and the last token is a label alone
        if len(ids) - 2 + contents.frame_count(len(audio)) > shape.tokens:
            return [(index, self._alone(example)) for index, example in pairs]
        mask = np.zeros(len(ids), bool) if prompt.mask is None else prompt.mask
        example = SalmExample(id=one.id, tokens=ids, loss_mask=mask, audio=(audio,))
        return [(pairs[0][0], example)]

    def _alone(self, example: SalmExample) -> SalmExample:
        rate_hz = self.contents.config.sample_rate
        return replace(
            example, audio=tuple(self.how.sound([wave], rate_hz) for wave in example.audio)
        )


def _finished(example: SalmExample, effects: ExampleEffects | None, rate_hz: int) -> SalmExample:
    if effects is None:
        return example
    audio = [effects.of_clip(n).on_result(w, rate_hz) for n, w in enumerate(example.audio)]
    return replace(example, audio=tuple(audio))
