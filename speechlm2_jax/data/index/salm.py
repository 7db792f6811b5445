"""A large data set of a SALM: conversations with token ids, and the lengths of their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import BatchShape, FrameCount
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.bucketing import Measures, Members
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.contents import IndexedContents, KeptRows, Part
from speechlm2_jax.data.index.frame_table import FrameTable
from speechlm2_jax.data.index.salm_columns import (
    LengthsOfRows,
    SalmColumns,
    longest_samples,
    token_lengths,
)
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.salm_contents import measure, placeholder_of, salm_columns, salm_shape
from speechlm2_jax.data.salm_examples import SalmExamples
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.data.salm_dataset import SALMDataset

_BLOCK_ROWS = 1 << 16


class SalmPart(Part, Protocol):
    """Rows of conversations of one voice."""

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token."""
        ...

    @property
    def locator_tags(self) -> frozenset[str]:
        """The tokens that stand for recordings."""
        ...


@dataclass(frozen=True, kw_only=True)
class IndexedSalmContents(IndexedContents, SalmExamples):
    """What is kept of all rows, as conversations with token ids (as `SalmContents`)."""

    parts: tuple[SalmPart, ...]
    formatter: PromptFormatter

    def _conversation(self, index: int) -> Conversation:
        return self[index]

    def shape(self, members: Members) -> BatchShape:
        """The shape of a bucket."""
        return salm_shape(members, self.config.sample_rate)

    def columns(self, shape: BatchShape) -> dict[str, str]:
        """Clips, and seconds of the longest."""
        return salm_columns(shape, self.config.sample_rate)

    def measured(self, indices: Sequence[int]) -> Measures:
        """Lengths of some conversations, which are read."""
        conversations = [self[index] for index in indices]
        return measure(conversations, frame_count=self.frame_count, config=self.config)

    def token_lengths(self) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Tokens before the last turn, and of the whole, of each conversation."""
        found = [
            token_lengths(part, start, min(start + _BLOCK_ROWS, len(part)))
            for part in self.parts
            for start in range(0, len(part), _BLOCK_ROWS)
        ]
        inputs, totals = map(np.concatenate, zip(*found, strict=True))
        return (inputs, totals) if self.row is None else (inputs[self.row], totals[self.row])

    def _finished(self, number: int, row: int) -> Conversation:
        """The conversation of a row with its token ids."""
        part = self.parts[number]
        made: Conversation = part.conversation(row)
        prompt = self.formatter.encode_dialog(self.formatter.dialog(made.messages()))
        columns = part.columns
        is_same = len(prompt.input_ids) == columns["tokens"][row] and (
            len(made.clips) == columns["clips"][row]
        )
        if not is_same or made.audio_duration_s != columns["duration_s"][row]:
            raise AudioError(f"{made.where}: changed since it was indexed", cause="changed")
        return replace(made, prompt=prompt, fields={**made.fields, **self.kept.fields[number]})


@dataclass(frozen=True, kw_only=True)
class SalmRowMeasures:
    """Measures rows of conversations of one voice (implements `RowMeasures`)."""

    dataset: "SALMDataset"
    config: DataLoaderConfig
    parts: tuple[SalmPart, ...]
    formatter: PromptFormatter
    frame_count: FrameCount
    placeholder_id: int
    columns: SalmColumns

    @classmethod
    def of(
        cls,
        dataset: "SALMDataset",
        config: DataLoaderConfig,
        parts: Sequence[SalmPart],
        frame_count: FrameCount,
        where: str,
    ) -> "SalmRowMeasures":
        """Checks what rows need together.

        Raises SettingsError if the prompt format or the audio tag does not suit the tokenizer.
        """
        formatter = dataset.formatter(config, where)
        with_audio = [part for part in parts if part.columns["clips"].any()]
        tags = {tag for part in with_audio for tag in part.locator_tags}
        placeholder_id = placeholder_of(tags, dataset.tokenizer, where)
        if any(not part.token_equivalent_s for part in with_audio):
            raise SettingsError(
                f"{where}: set token_equivalent_duration: the seconds of audio per token"
            )
        frames = FrameTable(frame_count, longest_samples(with_audio, config.sample_rate))
        return cls(
            dataset=dataset,
            config=config,
            parts=tuple(parts),
            formatter=formatter,
            frame_count=frame_count,
            placeholder_id=placeholder_id,
            columns=SalmColumns(config=config, frames=frames, has_audio=bool(with_audio)),
        )

    @property
    def key(self) -> list[Any]:
        """What lengths depend on, beside rows and settings."""
        return [self.columns.frames.values, [part.token_equivalent_s for part in self.parts]]

    def measure(self, part: int, start: int, stop: int) -> LengthsOfRows:
        """The rows of a part from `start` to `stop`."""
        return self.columns.measure(self.parts[part], start, stop)

    def contents(self, kept: KeptRows) -> IndexedSalmContents:
        """The conversations of the kept rows."""
        return IndexedSalmContents(
            dataset=self.dataset,
            config=self.config,
            frame_count=self.frame_count,
            placeholder_id=self.placeholder_id,
            parts=self.parts,
            formatter=self.formatter,
            kept=kept,
        )
