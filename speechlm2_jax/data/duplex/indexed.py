"""A large data set of a duplex model: each conversation is read when it is needed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.contents import (
    DuplexExamples,
    check_frame_rate,
    check_speakers,
    measures_of,
    silence_error,
)
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.duplex.speaker_counts import AGENT_TEXT, speakers_of
from speechlm2_jax.data.index.contents import IndexedContents, KeptRows, Part
from speechlm2_jax.data.index.lengths import LengthsOfRows, first_causes

if TYPE_CHECKING:
    from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset

CAUSES = ("longer_than_model", "shorter_than_frame", "min_duration", "max_duration")
"""As in `DuplexContents.tests`; the first that holds counts."""


@dataclass(frozen=True, kw_only=True)
class IndexedDuplexContents(IndexedContents, DuplexExamples):
    """What is kept of all rows, as conversations of user and agent (as `DuplexContents`)."""

    def _conversation(self, index: int) -> DuplexConversation:
        return self[index]

    def measured(self, indices: Sequence[int]) -> Measures:
        """Lengths of some conversations."""
        seconds = self._column("duration_s", np.asarray(indices, np.int64))
        return measures_of(self.dataset, seconds, self.config.sample_rate)

    def validation_error(self, planned: Callable[[], Int[np.ndarray, " n"]]) -> str | None:
        """A reason where the agent is silent in more than MAX_SILENT_SHARE of the first window."""
        rows = planned()
        silent = rows[self._column(AGENT_TEXT, rows) == 0]
        return silence_error(self.dataset, self.name, silent.tolist(), len(rows))

    def _finished(self, number: int, row: int) -> DuplexConversation:
        """The conversation of a row."""
        part = self.parts[number]
        made: DuplexConversation = part.conversation(row)
        if made.duration_s != part.columns["duration_s"][row]:
            raise AudioError(f"{made.where}: changed since it was indexed", cause="changed")
        return made


@dataclass(frozen=True, kw_only=True)
class DuplexRowMeasures:
    """Measures rows of conversations of two voices (implements `RowMeasures`)."""

    dataset: "DuplexS2SDataset"
    config: DuplexLoaderConfig
    parts: tuple[Part, ...]

    @classmethod
    def of(
        cls,
        dataset: "DuplexS2SDataset",
        config: DuplexLoaderConfig,
        parts: Sequence[Part],
        frame_count: FrameCount,
        where: str,
    ) -> "DuplexRowMeasures":
        """Checks roles and the model's frame rate, as `DuplexContents.of`. Raises SettingsError."""
        check_frame_rate(dataset, frame_count)
        found = speakers_of([part.columns for part in parts])
        check_speakers(found, dataset.input_roles, dataset.output_roles, where)
        return cls(dataset=dataset, config=config, parts=tuple(parts))

    @property
    def key(self) -> list[Any]:
        """What lengths depend on, beside rows and settings."""
        own, rates = (
            self.dataset,
            (self.dataset.source_sample_rate, self.dataset.target_sample_rate),
        )
        return [own.frame_length, *rates, own.max_frames]

    def measure(self, part: int, start: int, stop: int) -> LengthsOfRows:
        """The rows of a part from `start` to `stop`."""
        columns, config = self.parts[part].columns, self.config
        seconds = np.asarray(columns["duration_s"][start:stop])
        measures = measures_of(self.dataset, seconds, config.sample_rate)
        most = math.inf if self.dataset.max_frames is None else self.dataset.max_frames
        is_left_out = {
            "longer_than_model": measures.positions > most,
            "shorter_than_frame": seconds < self.dataset.frame_length,
            "min_duration": seconds < (config.min_duration or 0.0),
            "max_duration": seconds > (config.max_duration or math.inf),
        }
        return LengthsOfRows(
            measures=measures,
            causes=CAUSES,
            cause=first_causes(CAUSES, is_left_out, np.asarray(columns["flags"][start:stop])),
            seconds=seconds,
            tokens=np.zeros(len(seconds), np.int64),
        )

    def contents(self, kept: KeptRows) -> IndexedDuplexContents:
        """The conversations of the kept rows; two voices have no more fields."""
        return IndexedDuplexContents(
            dataset=self.dataset, config=self.config, parts=self.parts, kept=kept
        )
