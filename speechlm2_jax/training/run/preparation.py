"""Prepares a run: mesh, optimizer, layout of arrays, and the state of a new or resumed run."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import optax

from speechlm2_jax import checkpointing, processes
from speechlm2_jax.checkpointing import LayoutError, Restored
from speechlm2_jax.console import phase
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding
from speechlm2_jax.strategies import (
    Strategy,
    build_mesh,
    check_groups,
    check_heads,
    remat_policies,
)
from speechlm2_jax.training.intervals import Intervals
from speechlm2_jax.training.optimizer import AdamWConfig, Optimizer, read_optimizer
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.protocol import (
    CompletesBatches,
    DataSource,
    ModelOutline,
    TrainableModel,
    Variables,
)
from speechlm2_jax.training.run.directory import METRICS
from speechlm2_jax.training.run.metrics_log import drop_rows_after
from speechlm2_jax.training.run.run_state import RunProgress, RunState
from speechlm2_jax.training.run.step_reports import MAX_SKIPPED_IN_A_ROW
from speechlm2_jax.training.run.throughput import Throughput
from speechlm2_jax.training.state import (
    Layout,
    Partition,
    TrainState,
    first_state,
    plan_layout,
    put,
)
from speechlm2_jax.training.step import StepFunctions
from speechlm2_jax.training.trainer_config import TrainerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Devices, mesh, optimizer and array layout of a run. Nothing is on a device yet."""

    config: TrainerConfig
    devices: tuple[jax.Device, ...]
    sharding: Sharding
    partition: Partition
    adamw: AdamWConfig
    optimizer: Optimizer
    layout: Layout
    throughput: Throughput
    """Counts time, tokens and FLOPs, from when it is made."""

    @staticmethod
    def of(
        model: ModelOutline,
        config: TrainerConfig,
        strategy: Strategy,
        *,
        trains: bool = True,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Setup":
        """Chooses devices, mesh, optimizer and layout; sets the model's compute dtype and remat.

        Without `trains` the model needs no optimizer. `devices` replace those of the settings.
        Raises SettingsError if the model, the settings and the devices do not fit together.
        """
        devices = config.choose_devices() if devices is None else devices
        sharding = build_mesh(strategy, devices)
        check_heads(model.heads, sharding)
        partition, adamw = Partition.of(model.infos, model.trainable), AdamWConfig()
        if trains:
            partition.require_trainable()
            adamw = read_optimizer(model.optimizer)
        optimizer = Optimizer(
            transform=adamw.transform() if trains else optax.identity(),
            clip_norm=config.gradient_clip_val or 0.0,
            masks=partition.masks,
        )
        if model.compute_dtype != config.compute_dtype:  # setting it rebuilds the network
            model.compute_dtype = config.compute_dtype
        model.use_remat(remat_policies(config.remat, strategy))
        layout = plan_layout(model.infos, partition, optimizer, sharding, config.compute_dtype)
        return Setup(
            config=config,
            devices=tuple(devices),
            sharding=sharding,
            partition=partition,
            adamw=adamw,
            optimizer=optimizer,
            layout=layout,
            throughput=Throughput([device.device_kind for device in devices]),
        )

    def programs(self, model: ModelOutline, planned: int | None = None) -> Programs:
        """Makes the jitted functions for `planned` batch shapes. Nothing is compiled yet."""
        functions = StepFunctions(
            losses=model.losses,
            optimizer=self.optimizer,
            sharding=self.sharding,
            seed=self.config.seed,
            accumulate=self.config.accumulate_grad_batches,
            nemo_exact=model.nemo_exact,
            derive=model.derive if isinstance(model, CompletesBatches) else None,
        )
        compiling = partial(self.throughput.measure, "compiling")
        if not isinstance(model, CompletesBatches):
            return Programs(functions, self.layout, compiling, planned)
        # its sequences outgrow the planned shapes, so that their number is not known
        return Programs(functions, self.layout, compiling, complete=model.complete)

    def prepare_data(self, model: ModelOutline, datamodule: DataSource, groups: int) -> None:
        """Plans the batch shapes. Raises SettingsError if the mesh does not fit `groups`."""
        check_groups(groups, self.sharding)
        with phase("planning the data"):
            datamodule.setup(
                frame_count=model.frame_count,
                groups=groups,
                pad_to_multiple=self.sharding.length_multiple,
                own_groups=self.sharding.own_groups(groups),
            )

    def describe(self, groups: int) -> str:
        """One line: sizes of the model and the mesh."""
        state, frozen = self.layout.state, self.layout.frozen
        trained_count = sum(math.prod(leaf.shape) for leaf in state.trainable.values())
        frozen_count = sum(math.prod(leaf.shape) for leaf in frozen.values())
        sizes = ", ".join(f"{a} {n}" for a, n in self.sharding.mesh.shape.items() if n > 1)
        kind = self.devices[0].device_kind
        return (
            f"parameters: {trained_count:,} trained, {frozen_count:,} frozen; devices: "
            f"{len(self.devices)} x {kind}{f' ({sizes})' if sizes else ''}; groups of a global "
            f"batch: {groups}"
        )


def frozen_as_given(model: TrainableModel, setup: Setup) -> Variables:
    """The frozen arrays of a model before `fit` casts them; empty if it has no arrays yet."""
    if not model.has_variables:
        return {}
    return {path: model.variables[path] for path in setup.partition.frozen}


def groups_of(checkpoint: Restored | None, setup: Setup) -> int:
    """Groups of a global batch: the data-parallel size at the first start of the run."""
    if checkpoint is None:
        return setup.sharding.data_parallel_size
    return int(checkpoint.progress["groups"])


def initialize(model: TrainableModel, setup: Setup) -> RunState:
    """Makes the state of a new run from the model's variables.

    If the model has no arrays yet, they are streamed to their devices.
    """
    layout = setup.layout
    with phase("loading weights"):
        is_loaded = model.has_variables
        variables = model.variables if is_loaded else model.load_onto(layout.variables)
    return RunState(
        train_state=first_state(variables, layout, setup.optimizer),
        frozen=put(variables, layout.frozen, copy=False),
        progress=RunProgress(groups=setup.sharding.data_parallel_size),
    )


def resume(restored: Restored) -> RunState:
    """Makes the state of a resumed run from its checkpoint."""
    progress = RunProgress(**restored.progress)
    if progress.step in checkpointing.read_ranking(restored.step.parent).metrics:
        progress.validated_at = progress.step  # validated after the checkpoint was written
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        progress.skipped_in_a_row = 0  # otherwise the next skipped step would end the run again
    arrays = restored.arrays
    state = TrainState(
        trainable=arrays["params"],
        buffers=arrays["buffers"],
        opt_state=arrays["opt"]["state"],
        step=arrays["opt"]["step"],
        skipped=arrays["opt"]["skipped"],
    )
    return RunState(train_state=state, frozen=restored.frozen, progress=progress)


def restore(
    model: TrainableModel,
    layout: Layout,
    own: Path | None,
    other: Path | None,
    run_dir: Path | None,
) -> Restored | None:
    """Reads the checkpoint to resume from. Returns None for a new run.

    `checkpointing.restore` documents the order in which checkpoints are tried. Newer checkpoints of
    the run directory, which are unreadable, are renamed. Rows of metrics after the restored step
    are removed, as the run will write them again. Damaged frozen parameters are renamed too, if
    `model` can load them from their source. Raises SettingsError if the checkpoint has other
    variables than the model.
    """
    state = layout.state
    counters = {"step": state.step, "skipped": state.skipped}
    template = {
        "params": state.trainable,
        "buffers": state.buffers,
        "opt": {"state": state.opt_state, **counters},
    }
    with phase("reading the checkpoint"):
        try:
            restored = checkpointing.restore(
                own, other, template, layout.frozen, lambda: [_load_frozen(model, layout)]
            )
        except LayoutError as error:
            raise SettingsError(str(error)) from error
    if restored is not None:
        log.info("resuming from %s", restored.step)
    processes.barrier("checkpoint chosen")
    if run_dir is not None and jax.process_index() == 0:
        _remove_newer(restored, own, run_dir)
    processes.barrier("run directory tidied")
    return restored


def _load_frozen(model: TrainableModel, layout: Layout) -> Variables:
    """Loads the frozen parameters from the pretrained model, as a new run does."""
    variables = model.variables if model.has_variables else model.load_onto(layout.variables)
    return put(variables, layout.frozen, copy=False)


def _remove_newer(restored: Restored | None, own: Path | None, run_dir: Path) -> None:
    if restored is not None and own is not None and restored.step.parent == own.absolute():
        step = int(restored.step.name)
        checkpointing.set_aside_newer(own, step)
        if restored.has_rebuilt_frozen:
            checkpointing.set_aside_frozen(own)
        drop_rows_after(run_dir / METRICS, step)
    else:
        drop_rows_after(run_dir / METRICS, -1)


def finished_step(checkpoints: Path, intervals: Intervals, *, validates: bool) -> int | None:
    """The last step of a finished run; None if the run is not finished. Reads no arrays."""
    steps = checkpointing.step_folders(checkpoints)
    if not steps:
        return None
    try:
        progress = RunProgress(**checkpointing.read_item(steps[0], "progress"))
    except Exception:  # a damaged checkpoint: `restore` reports it and reads the one before
        return None
    is_validated = (
        not validates
        or progress.validated_at == progress.step
        or progress.step in checkpointing.read_ranking(checkpoints).metrics
    )
    is_over = intervals.is_finished(progress.step, progress.batches)
    return progress.step if is_over and is_validated else None
