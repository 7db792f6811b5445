"""What training asks of a model and of data; any object with these attributes can be trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from speechlm2_jax.batches import FrameCount, HostBatch, LossSum, StepLosses

Variables = dict[str, Any]
"""Dotted path -> array: every parameter and buffer of a network."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer of the model, to look at."""

    id: str
    reference: str
    """What the answer should be."""
    hypothesis: str
    """What the model said."""


@dataclass(frozen=True, kw_only=True)
class Scored(LossSum):
    """What a host metric makes of one batch: its share of the mean, and answers to look at."""

    samples: tuple[Sample, ...] = ()
    """All of them; the validator chooses."""


HostMetric = Callable[[HostBatch], LossSum]
"""A validation metric computed on the host, by generating answers for instance.

One that gives a `Scored` shows answers too.
"""


@runtime_checkable
class Scorer(Protocol):
    """Validation scores of whole sets, where sums over batches will not do (BLEU)."""

    def update(self, name: str, batch: HostBatch) -> Sequence[Sample]:
        """Answers a batch of set `name`; gives its answers to look at."""
        ...

    def compute(self) -> Mapping[str, float]:
        """`KEY_SET` for each set, and `KEY` over all."""
        ...


Scoring = Callable[[], AbstractContextManager[Scorer]]
"""What is entered for one validation, and let go of after it (a scoring model)."""


@runtime_checkable
class VariableSpec(Protocol):
    """What is known of a variable without its values (`layers.module.VariableInfo`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape; a leading layer axis where the layers are stacked."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype in which a checkpoint holds it."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical axis of each dimension."""
        ...

    @property
    def is_buffer(self) -> bool:
        """True for what is carried and never receives a gradient."""
        ...

    def computed_in(self, dtype: Any) -> Any:
        """The dtype that its value needs where activations have `dtype` and it is not trained."""
        ...


@runtime_checkable
class ModelOutline(Protocol):
    """All of a model that is known without its weights."""

    @property
    def infos(self) -> Mapping[str, VariableSpec]:
        """Every variable by path."""
        ...

    @property
    def has_variables(self) -> bool:
        """True if `variables` are there already, so that asking for them costs nothing."""
        ...

    @property
    def trainable(self) -> Mapping[str, bool | np.ndarray]:
        """Per parameter path: trained or not; for a partly frozen stack a bool [L]."""
        ...

    @property
    def compute_dtype(self) -> Any:
        """Dtype of activations; `fit` sets it from `trainer.precision` before it calls `losses`."""
        ...

    @compute_dtype.setter
    def compute_dtype(self, dtype: Any) -> None: ...

    @property
    def nemo_exact(self) -> bool:
        """Take means of batch means, as NeMo does, in accumulation and validation."""
        ...

    @property
    def optimizer(self) -> Mapping[str, Any] | None:
        """NeMo's `optimizer` block."""
        ...

    @property
    def lr_scheduler(self) -> Mapping[str, Any] | None:
        """NeMo's `lr_scheduler` block; None keeps the rate constant."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model's settings as plain values: saved with checkpoints and in config.yaml."""
        ...

    @property
    def validation_metrics(self) -> Mapping[str, HostMetric]:
        """Further validation metrics by name (`wer` is reported as `val_wer`); may be empty."""
        ...

    @property
    def heads(self) -> Mapping[str, int]:
        """How many attention heads there are of each kind, which tensor parallelism shares out."""
        ...

    @property
    def frame_count(self) -> FrameCount:
        """Samples of a clip -> steps that it takes in a row."""
        ...

    def use_remat(self, policies: Mapping[str, str]) -> None:
        """Chooses what the backward pass computes again, by part (`trainer.remat`)."""
        ...

    def losses(
        self, variables: Variables, batch: Any, *, key: jax.Array | None, train: bool
    ) -> StepLosses:
        """Computes sums for one batch: pure and traceable, variables in the dtypes as stored.

        `key` is one random key for the batch, None where nothing may be random. Its gradient is
        taken of `loss.total`; buffers are returned, never written.
        """
        ...

    def flops(self, batch: HostBatch) -> float:
        """Counts the model FLOPs of training on one batch, as MFU counts them."""
        ...

    def save_definition(self, directory: Path) -> None:
        """Writes all that a run directory needs to load the model again, but the weights."""
        ...

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts (steps that hold data, all steps) of a batch's rows: throughput and padding."""
        ...


@runtime_checkable
class NormalizesSettings(Protocol):
    """A model that can say which of its settings are the same; not every model need."""

    def normalized_settings(
        self, settings: Mapping[str, Any], definitions: Mapping[str, Mapping[str, Any]] | None
    ) -> Mapping[str, Any]:
        """Settings of this kind of model with all defaults, and without keys that mean nothing.

        `definitions` are the config.json of its pretrained parts by the folder in which
        `save_definition` writes them; None: this model's own. Raises ValueError for settings of
        another kind of model.
        """
        ...


@runtime_checkable
class TrainableModel(ModelOutline, Protocol):
    """A model that `Trainer.fit` can train."""

    @property
    def variables(self) -> Variables:
        """Current arrays, on host or device.

        `fit` keeps them up to date for validation metrics and leaves the trained ones here. They
        may be read or made when first asked for.
        """
        ...

    @variables.setter
    def variables(self, values: Variables) -> None: ...

    def load_onto(self, layout: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Makes the arrays of a model that has none yet, each with its leaf's dtype and sharding.

        They are streamed there: the host never holds all of them.
        """
        ...


@runtime_checkable
class BatchIterator(Protocol):
    """Training batches in order, able to say where it is."""

    def __iter__(self) -> Iterator[HostBatch]:
        """Itself."""
        ...

    def __next__(self) -> HostBatch:
        """The next batch. Raises StopIteration where the data ends."""
        ...

    def get_state(self) -> Any:
        """Plain JSON values: the state as of the batch last returned."""
        ...


@runtime_checkable
class DataSource(Protocol):
    """Training and validation data (`data.DataModule`)."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Conversations left out so far, by cause."""
        ...

    def setup(
        self,
        *,
        frame_count: FrameCount,
        groups: int,
        pad_to_multiple: int,
        own_groups: Sequence[int],
    ) -> None:
        """Prepares for global batches of so many groups, lengths multiples of `pad_to_multiple`.

        Of training batches only `own_groups` need be read: other processes have the rest.
        """
        ...

    def training_shapes(self) -> Mapping[str, Callable[[], HostBatch]]:
        """By the bucket's name, small to large: makes a batch of empty rows of a planned shape."""
        ...

    def batches_per_pass(self) -> int:
        """Global batches of one pass over the training data."""
        ...

    def train_batches(self, state: Any | None) -> BatchIterator:
        """Starts the training stream, or goes on from a state that an iterator gave."""
        ...

    def validation_batches(self) -> Mapping[str, Iterable[HostBatch]]:
        """Starts one pass over each named validation set."""
        ...
