"""Protocols of models and data: the attributes that the trainer reads."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from speechlm2_jax.batches import FrameCount, HostBatch, LossSum, StepLosses

Variables = dict[str, Any]
"""Dotted path -> array: every parameter and buffer of a network."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One hypothesis of the model and its reference, to be shown to the user."""

    id: str
    reference: str
    """The text that was expected."""
    hypothesis: str
    """The text that the model generated."""


@dataclass(frozen=True, kw_only=True)
class Scored(LossSum):
    """A host metric of one batch: its sum and count, and the hypotheses of the batch."""

    samples: tuple[Sample, ...] = ()
    """All hypotheses of the batch. The validator selects the few that are shown."""


HostMetric = Callable[[HostBatch], LossSum]
"""A validation metric computed on the host, for instance WER of generated text.

If it returns a `Scored`, its samples are shown.
"""


@runtime_checkable
class Scorer(Protocol):
    """Computes scores of whole validation sets, for metrics that are no mean (corpus BLEU)."""

    def update(self, name: str, batch: HostBatch) -> Sequence[Sample]:
        """Generates for a batch of set `name`. Returns its hypotheses."""
        ...

    def gather(self) -> None:
        """Adds what the other processes have scored.

        All processes call it, after the last batch of a validation that they share.
        """
        ...

    def compute(self) -> Mapping[str, float]:
        """The scores by name: `KEY_SET` for each set, and `KEY` over all sets."""
        ...


Scoring = Callable[[], AbstractContextManager[Scorer]]
"""A context manager for one validation; it may load and release a scoring model."""


@runtime_checkable
class VariableSpec(Protocol):
    """Shape, dtype and axes of a variable, without its values (`layers.module.VariableInfo`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape. If layers are stacked, the first axis is the layer."""
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

    def computed_in(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype of a frozen variable when activations have `dtype`."""
        ...


@runtime_checkable
class ModelOutline(Protocol):
    """The attributes of a model that need no weights: shapes, settings, loss function."""

    @property
    def infos(self) -> Mapping[str, VariableSpec]:
        """Every variable by path."""
        ...

    @property
    def has_variables(self) -> bool:
        """True if `variables` are in memory, so that reading the attribute loads nothing."""
        ...

    @property
    def trainable(self) -> Mapping[str, bool | np.ndarray]:
        """Parameter path -> whether it is trained; a bool [L] for a partly frozen stack."""
        ...

    @property
    def compute_dtype(self) -> Any:
        """Dtype of activations; `fit` sets it from `trainer.precision` before it calls `losses`."""
        ...

    @compute_dtype.setter
    def compute_dtype(self, dtype: DTypeLike) -> None:
        """Sets the dtype of activations."""
        ...

    @property
    def nemo_exact(self) -> bool:
        """Whether accumulation and validation take means of batch means, as NeMo does."""
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
        """Name of each kind of attention heads -> their number.

        Tensor parallelism shards the heads, so its size must divide each number.
        """
        ...

    @property
    def frame_count(self) -> FrameCount:
        """Audio samples of a clip -> its frames in the LLM's sequence."""
        ...

    def use_remat(self, policies: Mapping[str, str]) -> None:
        """Sets the rematerialisation policy of each component (`trainer.remat`)."""
        ...

    def losses(
        self, variables: Variables, batch: PyTree, *, key: jax.Array | None, train: bool
    ) -> StepLosses:
        """Computes the loss sums of one batch. It is a pure function that JAX can trace.

        `variables` have the dtypes in which they are stored. `key` is one random key for the batch;
        None: nothing is random. The trainer differentiates `loss.total`. New values of buffers are
        returned, never written.
        """
        ...

    def flops(self, batch: HostBatch) -> float:
        """Counts the model FLOPs of training on one batch, as MFU counts them."""
        ...

    def save_definition(self, directory: Path) -> None:
        """Writes all files that are needed to load the model, except the weights."""
        ...

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts (tokens without padding, all tokens) of a batch, for throughput and padding."""
        ...


@runtime_checkable
class NormalizesSettings(Protocol):
    """A model that can compare settings (optional)."""

    def normalized_settings(
        self, settings: Mapping[str, object], definitions: Mapping[str, Mapping[str, object]] | None
    ) -> Mapping[str, Any]:
        """Settings of this kind of model with all defaults and without ignored keys.

        `definitions` maps the folder of each pretrained component, as `save_definition` names it,
        to the contents of its config.json. None: those of this model. Raises ValueError for
        settings of another kind of model.
        """
        ...


@runtime_checkable
class CompletesBatches(Protocol):
    """A model that adds to a batch what it computes from it, as its transcripts (optional)."""

    def derive(
        self, variables: Variables, batch: PyTree, *, key: jax.Array | None, train: bool
    ) -> PyTree:
        """Computes arrays that `complete` reads. Pure and traceable; arguments as of `losses`."""
        ...

    def complete(self, batch: HostBatch, derived: PyTree, multiple: int) -> HostBatch:
        """Makes the batch of the loss from `derived`, on the host and on every process alike.

        The length of sequences stays a multiple of `multiple`.
        """
        ...


@runtime_checkable
class AveragesTokens(Protocol):
    """A model whose validation metrics are means over tokens even with `nemo_exact` (optional)."""

    @property
    def averages_tokens(self) -> bool:
        """Whether it is so."""
        ...


@runtime_checkable
class HasPerplexity(Protocol):
    """A model whose loss is the negative log-likelihood of tokens, in nats (optional)."""

    @property
    def loss_is_of_tokens(self) -> bool:
        """Whether it is so."""
        ...


@runtime_checkable
class HasTokenizer(Protocol):
    """A model with a text tokenizer (optional)."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Its `contents` is a checksum of its files, None if it has no files."""
        ...


@runtime_checkable
class TrainableModel(ModelOutline, Protocol):
    """A model that `Trainer.fit` can train."""

    @property
    def variables(self) -> Variables:
        """Current arrays, on host or device.

        `fit` sets them before each validation and at the end. They may be loaded or initialized on
        first access.
        """
        ...

    @variables.setter
    def variables(self, values: Variables) -> None:
        """Replaces them."""
        ...

    def load_onto(self, layout: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Loads the arrays of a model that has none yet, in the dtypes and shardings of `layout`.

        The arrays are streamed to the devices: the host never holds all of them.
        """
        ...


@runtime_checkable
class BatchIterator(Protocol):
    """Training batches in order, with a state that can be saved."""

    def __iter__(self) -> Iterator[HostBatch]:
        """Itself."""
        ...

    def __next__(self) -> HostBatch:
        """The next batch. Raises StopIteration at the end of the data."""
        ...

    def get_state(self) -> Any:
        """The state after the batch last returned, as plain JSON values."""
        ...


@runtime_checkable
class JoinsStates(Protocol):
    """Batches whose state each process knows in part, for the groups that it reads (optional)."""

    def joined_state(self, states: Sequence[Any]) -> Any:
        """The state of the run, of those of all processes."""
        ...


@runtime_checkable
class KeepsErrors(Protocol):
    """Data that list what cannot be read in a file (optional)."""

    def keep_errors(self, path: Path | None) -> None:
        """Adds to this file from the next stream on."""
        ...

    def errors_by_source(self) -> str:
        """A line per source and cause, with counts; empty if nothing failed."""
        ...


@runtime_checkable
class HasFingerprints(Protocol):
    """Data whose validation sets several processes can compare (optional)."""

    def fingerprints(self) -> Mapping[str, str]:
        """Validation set -> a text that changes with its data. Called after `setup`."""
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
        """Prepares for global batches of `groups` groups.

        Sequence lengths are padded to a multiple of `pad_to_multiple`. This process only needs to
        read the groups `own_groups` of training batches, and of validation batches that the
        processes share. Other processes read the rest.
        """
        ...

    def training_shapes(self) -> Mapping[str, Callable[[], HostBatch]]:
        """Bucket name -> function that makes a batch of its shape, all padding; small to large."""
        ...

    def batches_per_pass(self) -> int:
        """Global batches of one pass over the training data."""
        ...

    def train_batches(self, state: Mapping[str, object] | None) -> BatchIterator:
        """Starts the training stream, or resumes it from a state of `BatchIterator.get_state`."""
        ...

    def validation_batches(self, *, own_only: bool = False) -> Mapping[str, Iterable[HostBatch]]:
        """Starts one pass over each named validation set.

        `own_only` is True where several processes share a validation: only the groups `own_groups`
        need to be read, and only they have references.
        """
        ...
