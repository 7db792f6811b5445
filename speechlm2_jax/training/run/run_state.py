"""What the training loop works with, where it stands, and how it ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speechlm2_jax.checkpointing import Checkpointer
from speechlm2_jax.console import ProgressBar
from speechlm2_jax.training.exp_manager import CheckpointParams
from speechlm2_jax.training.intervals import Intervals
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.protocol import BatchIterator, DataSource, TrainableModel, Variables
from speechlm2_jax.training.run.metrics_log import MetricsLog
from speechlm2_jax.training.run.profiling import StepProfiler
from speechlm2_jax.training.run.stopping import StopRequest
from speechlm2_jax.training.run.throughput import Throughput
from speechlm2_jax.training.schedules import Schedule
from speechlm2_jax.training.state import TrainState
from speechlm2_jax.training.validation import Validator


@dataclass
class RunProgress:
    """Counters on the host, saved as JSON in every checkpoint (item `progress`)."""

    groups: int
    """Data-parallel groups of a global batch, fixed at the first start of the run."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    batches: int = 0
    """Micro-batches taken."""
    window: int = 0
    """Micro-batches of the last step."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    validated_at: int = 0
    """The step of the last validation."""
    data: Any = None
    """The training iterator's state."""


@dataclass(kw_only=True)
class RunState:
    """Where a run stands; the loop updates it."""

    train_state: TrainState
    """On the devices. Each step takes the old one (donated) and returns a new one."""
    frozen: Variables
    """Parameters that are not trained, on the devices."""
    progress: RunProgress
    val_metrics: dict[str, float] = field(default_factory=dict)
    """Of the last validation in this process."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    is_finished: bool
    """True if the run reached its end; False if it was stopped and can go on."""
    reason: str
    metrics: Mapping[str, float]
    """Of the last validation in this process."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What the loop works with; it does not change during a run."""

    model: TrainableModel
    datamodule: DataSource
    batches: BatchIterator
    programs: Programs
    schedule: Schedule
    intervals: Intervals
    validator: Validator | None
    """None: no validation."""
    checkpointer: Checkpointer | None
    """None: nothing is saved."""
    checkpoint_params: CheckpointParams
    metrics_log: MetricsLog
    throughput: Throughput
    stop: StopRequest
    bar: ProgressBar
    profiler: StepProfiler
    log_every_n_steps: int
    sanity_batches: int
