"""The objects that the training loop uses, the state of the run, and the result of `fit`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax.sharding import Mesh

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
from speechlm2_jax.training.run.watchdog import Watchdog
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
    """Steps that were not applied, in the whole run."""
    skipped_in_a_row: int = 0
    """Steps that were not applied since the last one that was."""
    validated_at: int = 0
    """The step of the last validation."""
    data: Mapping[str, object] | None = None
    """The training iterator's state."""


@dataclass(kw_only=True)
class RunState:
    """Arrays and counters of a run, which the loop updates."""

    train_state: TrainState
    """Arrays on the devices. Each step donates the old state and returns a new one."""
    frozen: Variables
    """Parameters that are not trained, on the devices."""
    progress: RunProgress
    val_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation in this process."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    is_finished: bool
    """True if the run reached its end; False if it was stopped and can be resumed."""
    reason: str
    metrics: Mapping[str, float]
    """Metrics of the last validation in this process."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The objects that the loop uses. They are the same during the whole run."""

    model: TrainableModel
    datamodule: DataSource
    batches: BatchIterator
    programs: Programs
    schedule: Schedule
    intervals: Intervals
    validator: Validator | None
    """None: no validation."""
    own_mesh: Mesh | None
    """This process's devices, if it validates its own groups (`Sharding.own_mesh`)."""
    checkpointer: Checkpointer | None
    """None: nothing is saved."""
    checkpoint_params: CheckpointParams
    metrics_log: MetricsLog
    throughput: Throughput
    stop: StopRequest
    bar: ProgressBar
    profiler: StepProfiler
    watchdog: Watchdog
    log_every_n_steps: int
    sanity_batches: int
