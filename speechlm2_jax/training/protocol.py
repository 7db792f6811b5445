"""Protocols of a model and of data: any object with these attributes can be trained."""

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
    """One hypothesis of the model beside its reference, to be shown."""

    id: str
    reference: str
    """The text that was expected."""
    hypothesis: str
    """The text that the model generated."""


@dataclass(frozen=True, kw_only=True)
class Scored(LossSum):
    """A host metric of one batch: its sum and count, and sample hypotheses to be shown."""

    samples: tuple[Sample, ...] = ()
    """All of the batch; the validator selects some."""


HostMetric = Callable[[HostBatch], LossSum]
"""A validation metric computed on the host, for instance WER of generated text.

If it returns a `Scored`, its samples are shown.
"""


@runtime_checkable
class Scorer(Protocol):
    """Validation scores of whole sets, for metrics that are no mean over batches (BLEU)."""

    def update(self, name: str, batch: HostBatch) -> Sequence[Sample]:
        """Generates for a batch of set `name`; returns samples to be shown."""
        ...

    def compute(self) -> Mapping[str, float]:
        """`KEY_SET` for each set, and `KEY` over all."""
        ...


Scoring = Callable[[], AbstractContextManager[Scorer]]
"""A context manager for one validation; it may load and release a scoring model."""


@runtime_checkable
class VariableSpec(Protocol):
    """Shape, dtype and axes of a variable, without its values (`layers.module.VariableInfo`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape; a leading layer axis where the layers are stacked."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype in checkpoints."""
        ...

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical axis of each dimension."""
        ...

    @property
    def is_buffer(self) -> bool:
        """True for a variable without gradient (batch-norm statistics, filterbanks)."""
        ...

    def computed_in(self, dtype: Any) -> Any:
        """The dtype of a frozen variable when activations have `dtype`."""
        ...


@runtime_checkable
class ModelOutline(Protocol):
    """The part of a model that needs no weights: shapes, settings, loss function."""

    @property
    def infos(self) -> Mapping[str, VariableSpec]:
        """Every variable by path."""
        ...

    @property
    def has_variables(self) -> bool:
        """True if `variables` are loaded, so that reading the attribute costs nothing."""
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
        """Attention heads of each kind; tensor parallelism shards them, so it must divide each."""
        ...

    @property
    def frame_count(self) -> FrameCount:
        """Audio samples of a clip -> its frames in the LLM's sequence."""
        ...

    def use_remat(self, policies: Mapping[str, str]) -> None:
        """Sets the rematerialisation policy of each component (`trainer.remat`)."""
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
        """Writes all files that loading the model from a run directory needs, but the weights."""
        ...

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts (tokens without padding, all tokens) of a batch, for throughput and padding."""
        ...


@runtime_checkable
class NormalizesSettings(Protocol):
    """A model that can compare settings (optional)."""

    def normalized_settings(
        self, settings: Mapping[str, Any], definitions: Mapping[str, Mapping[str, Any]] | None
    ) -> Mapping[str, Any]:
        """Settings of this kind of model with all defaults and without ignored keys.

        `definitions` are the config.json of its pretrained components by the folder in which
        `save_definition` writes them; None: this model's own. Raises ValueError for settings of
        another kind of model.
        """
        ...


@runtime_checkable
class HasTokenizer(Protocol):
    """A model with a text tokenizer (optional)."""

    @property
    def tokenizer(self) -> Any:
        """Has `contents`: a checksum of the files that decide its ids, None without files."""
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
    """Training batches in order, with a state that can be saved."""

    def __iter__(self) -> Iterator[HostBatch]:
        """Itself."""
        ...

    def __next__(self) -> HostBatch:
        """The next batch. Raises StopIteration where the data ends."""
        ...

    def get_state(self) -> Any:
        """The state after the batch last returned, as plain JSON values."""
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

        This process only needs to read `own_groups` of training batches; other processes read
        the rest.
        """
        ...

    def training_shapes(self) -> Mapping[str, Callable[[], HostBatch]]:
        """Bucket name -> function that makes an all-padding batch of its shape; small to large."""
        ...

    def batches_per_pass(self) -> int:
        """Global batches of one pass over the training data."""
        ...

    def train_batches(self, state: Any | None) -> BatchIterator:
        """Starts the training stream, or resumes it from a state of `BatchIterator.get_state`."""
        ...

    def validation_batches(self) -> Mapping[str, Iterable[HostBatch]]:
        """Starts one pass over each named validation set."""
        ...
