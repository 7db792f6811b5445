"""The user-facing classes of training: `Trainer`, `exp_manager`, `trainer.fit(model, data)`."""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from speechlm2_jax.checkpointing import CHECKPOINTS, Restored, read_ranking, step_folders
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.console import ProgressBar
from speechlm2_jax.object_store.folders import address_of
from speechlm2_jax.settings import build
from speechlm2_jax.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    build_mesh,
    check_heads,
    read_strategy,
)
from speechlm2_jax.training.exp_manager import ExpManagerConfig, run_folder
from speechlm2_jax.training.loop import FitLoop, NonFiniteRun, finished_reason
from speechlm2_jax.training.optimizer import read_optimizer
from speechlm2_jax.training.protocol import (
    DataSource,
    HostMetric,
    ModelOutline,
    Scoring,
    TrainableModel,
)
from speechlm2_jax.training.run import directory as run_directory
from speechlm2_jax.training.run import finishing, hosts, profiling
from speechlm2_jax.training.run.changed_settings import check_resumed, is_other_model
from speechlm2_jax.training.run.disk_errors import disk_errors
from speechlm2_jax.training.run.goodput import TimeReport, add_start
from speechlm2_jax.training.run.metrics_log import format_samples, format_validation
from speechlm2_jax.training.run.opening import OpenRun, finished_folder, other_run
from speechlm2_jax.training.run.outputs import (
    checkpoints_folder,
    list_data_errors,
    open_checkpointer,
    open_metrics_log,
    settings_of,
    write_description,
)
from speechlm2_jax.training.run.preparation import (
    Setup,
    finished_step,
    frozen_as_given,
    groups_of,
    initialize,
    restore,
    resume,
)
from speechlm2_jax.training.run.run_state import FitResult, RunContext, RunState
from speechlm2_jax.training.run.stopping import StopRequest
from speechlm2_jax.training.run.summary import describe_run
from speechlm2_jax.training.run.watchdog import Watchdog
from speechlm2_jax.training.schedules import make_schedule
from speechlm2_jax.training.state import Partition
from speechlm2_jax.training.trainer_config import TrainerConfig
from speechlm2_jax.training.validation import Validator, make_validator
from speechlm2_jax.training.validation_shares import generating_from_own_copies, validation_sets

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
        """Raises SettingsError for an unknown key, a wrong type, or an unsupported value."""
        self.config = build(TrainerConfig, options, "trainer")
        self.strategy = read_strategy(self.config.strategy)
        self.experiment = ExpManagerConfig()
        root = self.config.default_root_dir
        self.run_dir = run_folder(root) if root else None
        self._options = options
        self._experiment_options: Mapping[str, Any] = {}
        self._importing_s: float | None = None
        self._opened: OpenRun | None = None
        """The run directory, locked from `use_experiment` to the end of `fit`."""

    def use_experiment(self, options: Mapping[str, object]) -> Path:
        """Takes an `exp_manager` block; makes and returns the run directory.

        Raises SettingsError if the directory cannot be written, if its checkpoints do not match the
        `resume_*` keys of the block, if another process trains there, or if the run's processes do
        not share it.
        """
        self.experiment = build(ExpManagerConfig, options, "exp_manager")
        self.run_dir, self._experiment_options = self.experiment.run_dir(), options
        hosts.together(self.experiment.check_loggers)
        if self._opened is not None:
            self._opened.release()
        self._open(self.run_dir)
        return self.run_dir

    def check_experiment(self, options: Mapping[str, object] | None) -> None:
        """Checks an `exp_manager` block and writes nothing. Raises SettingsError for an error."""
        build(ExpManagerConfig, options or {}, "exp_manager").check_loggers()

    def keep_compiled_programs(self) -> None:
        """Enables the compilation cache from here on, as `fit` does (`compilation_cache_dir`)."""
        keep_compiled_programs(self.config.compilation_cache_dir)

    def count_from_process_start(self, importing_s: float) -> None:
        """Lets the times of the next `fit` be those of the whole process, as train.py does.

        `importing_s` are the seconds from the start of the process to the end of its imports.
        """
        self._importing_s = importing_s

    @property
    def has_checkpoint(self) -> bool:
        """True if `fit` will resume from a checkpoint of its own run directory."""
        own = None if self.run_dir is None else self.run_dir / CHECKPOINTS
        return own is not None and self.experiment.resume_if_exists and bool(step_folders(own))

    def check(self, model: ModelOutline) -> None:
        """Checks the settings of a TrainableModel that `fit` will read. Needs no weights.

        Raises SettingsError for settings that do not fit together.
        """
        check_heads(model.heads, build_mesh(self.strategy, self.config.choose_devices()))
        self.config.intervals()
        adamw = read_optimizer(model.optimizer)
        make_schedule(model.lr_scheduler, adamw.lr)
        Partition.of(model.infos, model.trainable).require_trainable()

    def finished(
        self, options: Mapping[str, object] | None, settings: Mapping[str, object] | None = None
    ) -> FitResult | None:
        """Returns the result of the run of an `exp_manager` block if it is finished, else None.

        If it is finished, logs that and how to extend it. Reads only the counters of the newest
        checkpoint, and writes only train.log. `settings` are those of the whole run. If they are
        given and describe another model than that of the run directory, the result is None.
        """
        experiment = build(ExpManagerConfig, options or {}, "exp_manager")
        if options is None or not experiment.resume_if_exists:
            return None
        folder = finished_folder(experiment.run_dir())
        if folder is None:
            return None
        step = hosts.chosen_by_first(lambda: self._finished_step(folder, settings))
        if step is None:
            return None
        reason = finished_reason(step)
        is_local = address_of(folder) is None
        with run_directory.logging_to(folder if is_local else None):
            log.info("%s", reason)
            run_directory.log_next_commands(folder, step=step, is_finished=True)
        metrics = read_ranking(folder / CHECKPOINTS).metrics.get(step, {})
        result = FitResult(
            step=step,
            is_finished=True,
            reason=reason,
            metrics={name: math.nan if v is None else v for name, v in metrics.items()},
        )
        finishing.mark(folder if is_local else None, result)
        return result

    def _finished_step(self, run_dir: Path, settings: Mapping[str, object] | None) -> int | None:
        if settings is not None and is_other_model(run_dir, settings):
            return None
        own, intervals = run_dir / CHECKPOINTS, self.config.intervals()
        return finished_step(own, intervals, validates=self.config.validates)

    def fit(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        *,
        validation_metrics: Mapping[str, HostMetric] | None = None,
        validation_scoring: Scoring | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> FitResult:
        """Trains `model` until the end of the run, or until it is asked to stop.

        Args:
            model: anything with the attributes of `training.protocol.TrainableModel`.
            datamodule: training and validation batches.
            validation_metrics: replace the model's own validation metrics.
            validation_scoring: scores of whole validation sets (BLEU), beside the metrics.
            settings: written to config.yaml; by default the settings of model, trainer and data.

        Raises SettingsError for settings that do not fit together, NonFiniteRun (exit code 1) after
        20 skipped steps in a row, DiskError if the run directory can no longer be written.
        """
        began = time.monotonic()
        settings = settings or settings_of(
            model, datamodule, self._options, self.config.strategy, self._experiment_options
        )
        hosts.check_start(settings)
        stop = StopRequest(_shortest(self.config.time_limit_s, self.experiment.time_limit_s))
        with ExitStack() as stack:
            self._enter_run(stack, stop)
            outputs = stack.enter_context(ExitStack())
            # mesh: devices, optimizer, and the layout of every array
            setup = Setup.of(model, self.config, self.strategy)
            add_start(setup.throughput, self._importing_s, time.monotonic() - began)
            self._importing_s = None  # only the first call of a process has imported
            with setup.throughput.measure("starting"):
                frozen = frozen_as_given(model, setup)
                # restore: None for a new run. It comes before the data, which is planned for the
                # number of groups that the run began with.
                checkpoint = self._restore(model, setup, settings)
                groups = groups_of(checkpoint, setup)
                # data
                setup.prepare_data(model, datamodule, groups)
                # state
                state = initialize(model, setup) if checkpoint is None else resume(checkpoint)
                del checkpoint  # its arrays are the state's, which the first step replaces
                log.info(setup.describe(groups))
                validator = make_validator(
                    *(model, self.config, validation_metrics, validation_scoring),
                    *(stop, setup.throughput),
                    is_shared=setup.sharding.own_mesh() is not None,
                )
                context = self._open_context(
                    model, datamodule, settings, setup, state, validator, stop, outputs
                )
            finishing.unmark(self.run_dir)
            # loop
            loop = FitLoop(context, state)
            try:
                result = loop.run()
            finally:
                loop.publish()
                model.variables = {**model.variables, **frozen}
            with setup.throughput.measure("rest"):
                outputs.close()
            run_directory.log_next_commands(
                self.run_dir, step=result.step, is_finished=result.is_finished
            )
            finishing.mark(self.run_dir, result)
            return result

    def dry_run(self, model: ModelOutline, datamodule: DataSource) -> None:
        """Prints what `fit` would do: modules, shapes, memory, steps. Trains and writes nothing.

        Needs no weights. Raises SettingsError as `fit` does.
        """
        with run_directory.logging_to(None), self.config.matmul_precision():
            keep_compiled_programs(self.config.compilation_cache_dir)
            setup = Setup.of(model, self.config, self.strategy)
            groups = setup.sharding.data_parallel_size
            setup.prepare_data(model, datamodule, groups)
            for line in describe_run(model, datamodule, setup, self.config.intervals()):
                log.info("%s", line)

    def validate(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        *,
        validation_metrics: Mapping[str, HostMetric] | None = None,
        validation_scoring: Scoring | None = None,
    ) -> dict[str, float]:
        """Validates the model with its current weights.

        Returns the metrics by name: `val_<metric>` and `val_<metric>_<set>`.
        """
        with run_directory.logging_to(None), self.config.matmul_precision():
            setup = Setup.of(model, self.config, self.strategy, trains=False)
            setup.prepare_data(model, datamodule, setup.sharding.data_parallel_size)
            state = initialize(model, setup)
            programs, own = setup.programs(model), setup.sharding.own_mesh()
            validator = make_validator(
                *(model, self.config, validation_metrics, validation_scoring),
                is_shared=own is not None,
            )
            with generating_from_own_copies(model, own):
                result = validator.run(
                    validation_sets(datamodule, own),
                    lambda batch: programs.evaluate(state.train_state, state.frozen, batch),
                )
            for line in format_samples(0, result.samples):
                log.info("%s", line)
            log.info(format_validation({"step": 0, **result.metrics}))
            return result.metrics

    def _open(self, run_dir: Path) -> OpenRun:
        """Makes and locks the run directory. Raises SettingsError on all processes."""
        if self._opened is None or self._opened.folder != run_dir:
            self._opened = OpenRun(run_dir)
        self._opened.open(self.experiment.check_resume)
        return self._opened

    def _enter_run(self, stack: ExitStack, stop: StopRequest) -> None:
        """Locks the run directory, opens train.log and catches signals until `stack` closes."""
        opened = None if self.run_dir is None else self._open(self.run_dir)
        if opened is not None:
            stack.enter_context(opened.training())
        stack.enter_context(disk_errors(self.run_dir))
        stack.enter_context(run_directory.logging_to(self.run_dir))
        stack.enter_context(stop.catching_signals())
        if opened is not None:
            stack.enter_context(opened.uploading())
        stack.enter_context(self.config.matmul_precision())
        keep_compiled_programs(self.config.compilation_cache_dir)

    def _restore(
        self, model: TrainableModel, setup: Setup, settings: Mapping[str, object]
    ) -> Restored | None:
        """Reads the checkpoint to resume from; None for a new run."""
        experiment, own = self.experiment, None
        if experiment.resume_if_exists:
            own = checkpoints_folder(experiment, self.run_dir)
        sources = (own, other_run(experiment.resume_from_checkpoint))
        check_resumed(sources, model, settings, allows_changes=experiment.resume_allow_changes)
        return restore(model, setup.layout, *sources, self.run_dir)

    def _open_context(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        settings: Mapping[str, object],
        setup: Setup,
        state: RunState,
        validator: Validator,
        stop: StopRequest,
        stack: ExitStack,
    ) -> RunContext:
        """Opens what the loop uses, until `stack` closes, and writes the description of the run."""
        config, experiment, intervals = self.config, self.experiment, self.config.intervals()
        metrics_log = open_metrics_log(experiment, self.run_dir, settings, stack)
        times = TimeReport(metrics_log, setup.throughput, datamodule, state.progress, self.run_dir)
        stack.callback(times.write)
        bar = ProgressBar(
            total=intervals.last_step,
            done=state.progress.step,
            is_wanted=config.enable_progress_bar and jax.process_index() == 0,
        )
        stack.callback(bar.close)
        traces = (self.run_dir or Path()) / profiling.FOLDER
        profiler = stack.enter_context(
            profiling.StepProfiler(config.profile_steps, traces).closing()
        )
        planned = len(datamodule.training_shapes())
        list_data_errors(self.run_dir, datamodule)
        batches = datamodule.train_batches(state.progress.data)
        hosts.check_data(datamodule, batches)
        context = RunContext(
            model=model,
            datamodule=datamodule,
            batches=batches,
            programs=setup.programs(model, planned),
            schedule=make_schedule(model.lr_scheduler, setup.adamw.lr),
            intervals=intervals,
            validator=validator if config.validates else None,
            own_mesh=setup.sharding.own_mesh(),
            checkpointer=open_checkpointer(experiment, self.run_dir, state.frozen, stack),
            checkpoint_params=experiment.checkpoint_callback_params,
            metrics_log=metrics_log,
            throughput=setup.throughput,
            stop=stop,
            bar=bar,
            profiler=profiler,
            watchdog=Watchdog(config.watchdog_s, self.run_dir),
            log_every_n_steps=config.log_every_n_steps,
            sanity_batches=config.num_sanity_val_steps,
        )
        write_description(self.run_dir, model, settings)
        return context


def exp_manager(trainer: Trainer, cfg: Mapping[str, object] | None = None) -> Path | None:
    """Gives a trainer its run directory, checkpoints and loggers from an `exp_manager` block.

    Returns the run directory; None without a block. Raises SettingsError for an invalid block.
    """
    return None if cfg is None else trainer.use_experiment(cfg)


def _shortest(*limits_s: float | None) -> float | None:
    given = [limit for limit in limits_s if limit is not None]
    return min(given) if given else None
