"""Conversations of a SALM as examples and as arrays, of small and of large data sets."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speechlm2_jax.batches import (
    BatchShape,
    FrameCount,
    SalmBatch,
    SalmExample,
    assemble_salm_batch,
)
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import Conversation

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ExampleEffects
    from speechlm2_jax.data.salm_dataset import SALMDataset, SalmReference


@dataclass(frozen=True, kw_only=True)
class SalmExamples(ABC):
    """Reads conversations with token ids, and assembles batches of them."""

    dataset: "SALMDataset"
    config: DataLoaderConfig
    frame_count: FrameCount
    placeholder_id: int
    """Stands for a recording; -1, which no text has, where there is none."""

    @abstractmethod
    def _conversation(self, index: int) -> Conversation:
        """A conversation with its token ids. Raises AudioError if its row has changed."""
        ...

    def example(self, index: int, effects: "ExampleEffects | None" = None) -> SalmExample:
        """Reads a conversation's audio. Raises AudioError if any of it cannot be used."""
        return self.dataset.example(self._conversation(index), self.config.sample_rate, effects)

    def assemble(
        self,
        groups: Sequence[Sequence[SalmExample | None]],
        shape: BatchShape,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> SalmBatch:
        """The arrays of groups of examples; None is an empty sequence. `rows` packs them."""
        return assemble_salm_batch(
            groups,
            shape,
            frame_count=self.frame_count,
            placeholder_id=self.placeholder_id,
            rows=rows,
        )

    def reference(self, index: int, example: SalmExample) -> "SalmReference":
        """The prompt of a conversation, with its audio, and the reference response."""
        return self.dataset.reference(self._conversation(index), example)
