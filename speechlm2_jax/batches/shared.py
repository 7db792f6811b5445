"""What every batch shares: sums that are divided once, and what the loader hands over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

FrameCount = Callable[[int], int]
"""Samples of a clip -> LLM-width frames that perception makes of it."""
TimeOrder = Callable[[int], np.ndarray | None]
"""Steps of a row -> which of them lies at each place; None if they lie in order."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossSum:
    """An unreduced mean: merged over micro-batches and devices, divided once."""

    total: Any
    """Float32 scalar: the sum over scored elements."""
    count: Any
    """Float32 scalar: how many elements were scored."""

    def merge(self, other: "LossSum") -> "LossSum":
        """Adds another share of the same quantity."""
        return LossSum(total=self.total + other.total, count=self.count + other.count)

    def mean(self) -> Any:
        """Divides; an empty sum is 0, never NaN."""
        return self.total / jax.numpy.maximum(self.count, 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """What a network gives the training step for one batch."""

    loss: LossSum
    """What is minimised."""
    metrics: dict[str, LossSum]
    """Named means to report, `acc` for instance."""
    buffers: dict[str, Any]
    """New values of buffers by variable path (batch-norm statistics); empty in evaluation."""


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """A batch as the loader gives it: arrays for the device, and facts for the host."""

    arrays: Any
    """The pytree of NumPy arrays that goes to the device (`SalmBatch`, `DuplexBatch`)."""
    ids: tuple[str, ...]
    """Ids of the conversations inside, in order of their rows; for reports."""
    bucket: str
    """Name of the static shape; one compiled program each."""
    references: tuple[Any, ...] = ()
    """Per conversation, what host-side validation metrics need (prompts and reference texts)."""
    share: float = 1.0
    """The part of its groups that is here; rows of the others, of other processes, are empty."""
