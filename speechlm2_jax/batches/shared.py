"""Loss sums, and the batch that the data loader yields."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from speechlm2_jax.arrays import AnyArray, Scalar
from speechlm2_jax.pytrees import register_pytree

A = TypeVar("A", covariant=True)
"""What the arrays of a pytree are: on the host, on the devices, or their shapes or shardings."""
FrameCount = Callable[[int], int]
"""Number of samples of a clip -> number of its frames after perception."""
TimeOrder = Callable[[int], np.ndarray | None]
"""Sequence length -> the position at each index (`Sharding.time_order`); None: in order."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class LossSum(Generic[A]):
    """Sum and count of a mean: merged over micro-batches and devices, divided once."""

    total: A
    """Float32 scalar: the sum over scored elements."""
    count: A
    """Float32 scalar: how many elements were scored."""

    def merge(self: "LossSum[Scalar]", other: "LossSum[Scalar]") -> "LossSum[Scalar]":
        """Adds the sum of another micro-batch."""
        return LossSum(total=self.total + other.total, count=self.count + other.count)

    def mean(self: "LossSum[Scalar]") -> AnyArray:
        """Returns total / count; 0, not NaN, if the count is 0."""
        return self.total / jax.numpy.maximum(self.count, 1.0)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """Loss, metrics and new buffers of one batch."""

    loss: LossSum[jax.Array]
    """The loss to minimise."""
    metrics: dict[str, LossSum[jax.Array]]
    """Means to log by name, for example `acc`."""
    buffers: dict[str, jax.Array]
    """New values of buffers (batch-norm statistics) by variable path; empty in evaluation."""


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """A batch of the data loader: arrays for the devices, and metadata that stays on the host."""

    arrays: Any
    """Pytree of NumPy arrays that is put on the devices (`SalmBatch`, `DuplexBatch`)."""
    ids: tuple[str, ...]
    """Ids of the conversations, in the order of their sequences in the batch; for reports."""
    bucket: str
    """Name of the static shape; each shape is compiled once."""
    references: tuple[Any, ...] = ()
    """Prompt and reference text of each conversation, for validation metrics on the host."""
    share: float = 1.0
    """Fraction of the groups that this process holds; the groups of other processes are empty."""
