"""What a user starts training with: `Trainer`, `exp_manager`, `trainer.fit(model, datamodule)`."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax

from speechlm2_jax import checkpointing
from speechlm2_jax.checkpointing import CHECKPOINTS, Checkpointer, Restored
from speechlm2_jax.settings import build, to_plain
from speechlm2_jax.sharding import Sharding
from speechlm2_jax.training import run_dir as run_directory
from speechlm2_jax.training.exp_manager import ExpManagerConfig
from speechlm2_jax.training.loop import (
    MAX_SKIPPED_IN_A_ROW,
    FitLoop,
    FitResult,
    NonFiniteRun,
    Parts,
    Progress,
)
from speechlm2_jax.training.meter import Meter
from speechlm2_jax.training.metrics_log import MetricsLog, drop_rows_after, format_validation
from speechlm2_jax.training.optimizer import AdamWConfig, Optimizer, read_optimizer
from speechlm2_jax.training.programs import Programs, keep_compiled_programs
from speechlm2_jax.training.protocol import DataSource, HostMetric, TrainableModel, Variables
from speechlm2_jax.training.schedules import make_schedule
from speechlm2_jax.training.state import (
    Layout,
    Partition,
    TrainState,
    first_state,
    plan_layout,
    put,
)
from speechlm2_jax.training.step import StepFunctions
from speechlm2_jax.training.stopping import StopRequest
from speechlm2_jax.training.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    build_mesh,
    check_groups,
    read_strategy,
)
from speechlm2_jax.training.trainer_config import TrainerConfig
from speechlm2_jax.training.validation import Validator

__all__ = [
    "DDPStrategy",
    "FSDPStrategy",
    "FitResult",
    "ModelParallelStrategy",
    "NonFiniteRun",
    "Trainer",
    "exp_manager",
]

log = logging.getLogger(__name__)


class Trainer:
    """Trains and validates models. Keywords are Lightning's (`TrainerConfig` lists them)."""

    def __init__(self, **options: Any):
        """Raises SettingsError for an unknown key, a wrong type, or what is not supported."""
        self.config = build(TrainerConfig, options, "trainer")
        self.strategy = read_strategy(self.config.strategy)
        self.experiment = ExpManagerConfig()
        self.run_dir = Path(self.config.default_root_dir) if self.config.default_root_dir else None
        self._options = options
        self._experiment_options: Mapping[str, Any] = {}

    def use_experiment(self, options: Mapping[str, Any]) -> Path:
        """Takes an `exp_manager` block; makes and returns the run directory.

        Raises SettingsError if it cannot be written or holds what the block does not expect.
        """
        self.experiment = build(ExpManagerConfig, options, "exp_manager")
        self.run_dir, self._experiment_options = self.experiment.run_dir(), options
        self.experiment.check_resume(self.run_dir)
        run_directory.create(self.run_dir)
        return self.run_dir

    def check(self, model: TrainableModel) -> None:
        """Reads what `fit` will read of settings. Raises SettingsError for what does not fit."""
        build_mesh(self.strategy, self.config.choose_devices())
        self.config.cadence()
        adamw = read_optimizer(model.optimizer)
        make_schedule(model.lr_scheduler, adamw.lr)
        Partition.of(model).require_trainable()

    def fit(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        *,
        validation_metrics: Mapping[str, HostMetric] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Trains `model` on the data until the end, or until it is told to stop.

        `validation_metrics` stands in for the model's own. `settings` are the whole settings for
        config.yaml; without them they are put together from the parts. Raises SettingsError for
        settings that do not fit, NonFiniteRun (exit code 1) after 20 skipped steps in a row.
        """
        stop = StopRequest(_shortest(self.config.time_limit_s, self.experiment.time_limit_s))
        with ExitStack() as stack:
            if self.run_dir is not None:
                self.experiment.check_resume(self.run_dir)
                run_directory.create(self.run_dir)
            stack.enter_context(run_directory.logging_to(self.run_dir))
            stack.enter_context(stop.listening())
            stack.enter_context(self.config.matmul_precision())
            setup = self._set_up(model)
            keep_compiled_programs(self.config.compilation_cache_dir)
            frozen_as_given = {path: model.variables[path] for path in setup.partition.frozen}
            loop = self._start_loop(model, datamodule, setup, stop, validation_metrics, stack)
            if self.run_dir is not None and jax.process_index() == 0:
                run_directory.describe(self.run_dir, settings or self._settings(model, datamodule))
                model.save_definition(self.run_dir / run_directory.MODEL)
            try:
                return loop.run()
            finally:
                loop.publish()
                model.variables = {**model.variables, **frozen_as_given}

    def validate(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        *,
        validation_metrics: Mapping[str, HostMetric] | None = None,
    ) -> dict[str, float]:
        """Validates the model as it is: `val_<metric>` and `val_<metric>_<set>`."""
        with run_directory.logging_to(None), self.config.matmul_precision():
            setup = self._set_up(model, trains=False)
            groups = setup.sharding.data_parallel_size
            _prepare_data(model, datamodule, groups, setup.sharding)
            state = first_state(model.variables, setup.layout, setup.optimizer)
            frozen = put(model.variables, setup.layout.frozen, copy=False)
            programs = self._programs(model, setup, setup.meter())
            metrics = _host_metrics(model, validation_metrics)
            validator = self._validator(model, programs, lambda: (state, frozen), metrics)
            results = validator.run(datamodule.validation_batches())
            log.info(format_validation({"step": 0, **results}))
            return results

    def _set_up(self, model: TrainableModel, *, trains: bool = True) -> "_Setup":
        """Decides devices, mesh, optimizer and layout; tells the model its compute dtype."""
        devices = self.config.choose_devices()
        sharding = build_mesh(self.strategy, devices)
        partition = Partition.of(model)
        adamw = AdamWConfig()
        if trains:
            partition.require_trainable()
            adamw = read_optimizer(model.optimizer)
        optimizer = Optimizer(
            transform=adamw.transform() if trains else optax.identity(),
            clip_norm=self.config.gradient_clip_val or 0.0,
            masks=partition.masks,
        )
        model.compute_dtype = self.config.compute_dtype
        layout = plan_layout(model.infos, partition, optimizer, sharding, self.config.compute_dtype)
        return _Setup(
            devices=tuple(devices),
            sharding=sharding,
            partition=partition,
            adamw=adamw,
            optimizer=optimizer,
            layout=layout,
        )

    def _start_loop(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        setup: "_Setup",
        stop: StopRequest,
        validation_metrics: Mapping[str, HostMetric] | None,
        stack: ExitStack,
    ) -> FitLoop:
        """Restores or begins, prepares the data, and puts the parts together."""
        config = self.config
        cadence, meter = config.cadence(), setup.meter()
        schedule = make_schedule(model.lr_scheduler, setup.adamw.lr)
        programs = self._programs(model, setup, meter)
        restored = self._restore(setup.layout)
        groups = setup.sharding.data_parallel_size if restored is None else _groups(restored)
        check_groups(groups, setup.sharding)
        _prepare_data(model, datamodule, groups, setup.sharding)
        start = _begin(model, setup) if restored is None else _go_on(restored)
        self._describe_start(setup, start.progress)
        checkpointer = self._open_checkpointer(start.frozen, stack)
        metrics = self._open_metrics(model, datamodule)
        stack.callback(metrics.close)

        def arrays() -> tuple[TrainState, Variables]:
            return loop.state, loop.frozen

        host_metrics = _host_metrics(model, validation_metrics)
        validator = self._validator(model, programs, arrays, host_metrics, stop)
        has_validation = config.limit_val_batches is None or config.limit_val_batches > 0
        loop = FitLoop(
            parts=Parts(
                model=model,
                datamodule=datamodule,
                batches=datamodule.train_batches(start.progress.data),
                programs=programs,
                schedule=schedule,
                cadence=cadence,
                validator=validator if has_validation else None,
                checkpointer=checkpointer,
                checkpoint_params=self.experiment.checkpoint_callback_params,
                metrics_log=metrics,
                meter=meter,
                stop=stop,
                log_every_n_steps=config.log_every_n_steps,
                sanity_batches=config.num_sanity_val_steps,
            ),
            state=start.state,
            frozen=start.frozen,
            progress=start.progress,
        )
        return loop

    def _restore(self, layout: Layout) -> Restored | None:
        """Reads where to go on (`checkpointing.restore` has the order), and tidies up after it."""
        other, state = self.experiment.resume_from_checkpoint, layout.state
        own = self._checkpoints if self.experiment.resume_if_exists else None
        counters = {"step": state.step, "skipped": state.skipped}
        restored = checkpointing.restore(
            own,
            Path(other) if other else None,
            {
                "params": state.trainable,
                "buffers": state.buffers,
                "opt": {"state": state.opt_state, **counters},
            },
            layout.frozen,
        )
        is_own = restored is not None and own is not None and restored.step.parent == own.absolute()
        if restored is not None:
            log.info("going on from %s", restored.step)
        if self.run_dir is not None and jax.process_index() == 0:
            step = int(restored.step.name) if restored is not None and is_own else -1
            if own is not None and is_own:
                checkpointing.set_aside_newer(own, step)
            drop_rows_after(self.run_dir / run_directory.METRICS, step)
        return restored

    @property
    def _checkpoints(self) -> Path | None:
        """Where checkpoints lie, None if nothing is saved."""
        is_kept = self.run_dir is not None and self.experiment.create_checkpoint_callback
        return self.run_dir / CHECKPOINTS if self.run_dir is not None and is_kept else None

    def _open_checkpointer(self, frozen: Variables, stack: ExitStack) -> Checkpointer | None:
        if self._checkpoints is None:
            return None
        retention = self.experiment.checkpoint_callback_params.retention()
        checkpointer = Checkpointer(self._checkpoints, retention)
        stack.callback(checkpointer.close)
        checkpointer.save_frozen(frozen)
        return checkpointer

    def _open_metrics(self, model: TrainableModel, datamodule: DataSource) -> MetricsLog:
        if self.run_dir is None or jax.process_index() != 0:
            return MetricsLog(None)
        experiment, folder = self.experiment, self.run_dir
        return MetricsLog(
            folder / run_directory.METRICS,
            tensorboard=folder / "tensorboard" if experiment.create_tensorboard_logger else None,
            wandb={"dir": str(folder), **(experiment.wandb_logger_kwargs or {})}
            if experiment.create_wandb_logger
            else None,
            settings=self._settings(model, datamodule),
        )

    def _programs(self, model: TrainableModel, setup: "_Setup", meter: Meter) -> Programs:
        functions = StepFunctions(
            losses=model.losses,
            optimizer=setup.optimizer,
            sharding=setup.sharding,
            seed=self.config.seed,
            accumulate=self.config.accumulate_grad_batches,
            nemo_exact=model.nemo_exact,
        )
        return Programs(
            functions,
            setup.layout,
            compiling=lambda: meter.measure("compiling"),
        )

    def _validator(
        self,
        model: TrainableModel,
        programs: Programs,
        arrays: Callable[[], tuple[TrainState, Variables]],
        host_metrics: Mapping[str, HostMetric],
        stop: StopRequest | None = None,
    ) -> Validator:
        return Validator(
            evaluate=lambda batch: programs.evaluate(*arrays(), batch),
            host_metrics=host_metrics,
            nemo_exact=model.nemo_exact,
            limit=self.config.limit_val_batches,
            should_stop=lambda: stop is not None and stop.reason is not None,
        )

    def _settings(self, model: TrainableModel, datamodule: DataSource) -> dict[str, Any]:
        """The settings of a run as config.yaml has them, from its parts."""
        trainer = dict(self._options)
        if isinstance(self.config.strategy, DDPStrategy | FSDPStrategy | ModelParallelStrategy):
            name = type(self.config.strategy).__name__
            trainer["strategy"] = {"_target_": name, **to_plain(self.config.strategy)}
        return {
            "model": to_plain(model.settings),
            "trainer": to_plain(trainer),
            "data": to_plain(getattr(datamodule, "settings", {})),
            "exp_manager": to_plain(self._experiment_options),
        }

    def _describe_start(self, setup: "_Setup", progress: Progress) -> None:
        count = {
            kind: sum(math.prod(leaf.shape) for leaf in tree.values())
            for kind, tree in (
                ("trained", setup.layout.state.trainable),
                ("frozen", setup.layout.frozen),
            )
        }
        sizes = ", ".join(f"{a} {n}" for a, n in setup.sharding.mesh.shape.items() if n > 1)
        log.info(
            "parameters: %s trained, %s frozen; devices: %d x %s%s; groups of a global batch: %d",
            *(f"{count['trained']:,}", f"{count['frozen']:,}", len(setup.devices)),
            *(setup.devices[0].device_kind, f" ({sizes})" if sizes else "", progress.groups),
        )


def exp_manager(trainer: Trainer, cfg: Mapping[str, Any] | None = None) -> Path | None:
    """Gives a trainer its run directory, checkpoints and loggers from an `exp_manager` block.

    Returns the run directory, None without a block. Raises SettingsError for what does not fit.
    """
    return None if cfg is None else trainer.use_experiment(cfg)


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What is decided before any array is placed."""

    devices: tuple[jax.Device, ...]
    sharding: Sharding
    partition: Partition
    adamw: AdamWConfig
    optimizer: Optimizer
    layout: Layout

    def meter(self) -> Meter:
        """Starts counting time for these devices."""
        return Meter([device.device_kind for device in self.devices])


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where training begins or goes on."""

    state: TrainState
    frozen: Variables
    progress: Progress


def _begin(model: TrainableModel, setup: _Setup) -> _Start:
    return _Start(
        state=first_state(model.variables, setup.layout, setup.optimizer),
        frozen=put(model.variables, setup.layout.frozen, copy=False),
        progress=Progress(groups=setup.sharding.data_parallel_size),
    )


def _groups(restored: Restored) -> int:
    return int(restored.progress["groups"])


def _go_on(restored: Restored) -> _Start:
    progress = Progress(**restored.progress)
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        progress.skipped_in_a_row = 0  # it stopped over these; it may try once more
    arrays = restored.arrays
    state = TrainState(
        trainable=arrays["params"],
        buffers=arrays["buffers"],
        opt_state=arrays["opt"]["state"],
        step=arrays["opt"]["step"],
        skipped=arrays["opt"]["skipped"],
    )
    return _Start(state=state, frozen=restored.frozen, progress=progress)


def _prepare_data(
    model: TrainableModel, datamodule: DataSource, groups: int, sharding: Sharding
) -> None:
    datamodule.setup(
        frame_count=model.frame_count, groups=groups, pad_to_multiple=sharding.length_multiple
    )


def _host_metrics(
    model: TrainableModel, given: Mapping[str, HostMetric] | None
) -> Mapping[str, HostMetric]:
    return model.validation_metrics if given is None else given


def _shortest(*limits_s: float | None) -> float | None:
    given = [limit for limit in limits_s if limit is not None]
    return min(given) if given else None
