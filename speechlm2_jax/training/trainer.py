"""What a user starts training with: `Trainer`, `exp_manager`, `trainer.fit(model, datamodule)`."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from speechlm2_jax.checkpointing import CHECKPOINTS, Checkpointer
from speechlm2_jax.settings import build, to_plain
from speechlm2_jax.training import run_dir as run_directory
from speechlm2_jax.training.exp_manager import ExpManagerConfig
from speechlm2_jax.training.loop import FitLoop, FitResult, NonFiniteRun, Parts
from speechlm2_jax.training.metrics_log import MetricsLog, format_validation
from speechlm2_jax.training.optimizer import read_optimizer
from speechlm2_jax.training.programs import keep_compiled_programs
from speechlm2_jax.training.protocol import DataSource, HostMetric, TrainableModel, Variables
from speechlm2_jax.training.schedules import make_schedule
from speechlm2_jax.training.start import Setup, begin, go_on, restore
from speechlm2_jax.training.state import Partition
from speechlm2_jax.training.stopping import StopRequest
from speechlm2_jax.training.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    build_mesh,
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

    def check(self, model: Any) -> None:
        """Reads what `fit` will read of a TrainableModel's settings, before its weights are.

        Raises SettingsError for what does not fit.
        """
        build_mesh(self.strategy, self.config.choose_devices())
        self.config.cadence()
        adamw = read_optimizer(model.optimizer)
        make_schedule(model.lr_scheduler, adamw.lr)
        Partition.of(model.infos, model.trainable).require_trainable()

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
            setup = Setup.of(model, self.config, self.strategy)
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
            setup = Setup.of(model, self.config, self.strategy, trains=False)
            setup.prepare_data(model, datamodule, setup.sharding.data_parallel_size)
            start = begin(model, setup)
            programs = setup.programs(model, setup.meter())
            results = self._validator(model, validation_metrics).run(
                datamodule.validation_batches(),
                lambda batch: programs.evaluate(start.state, start.frozen, batch),
            )
            log.info(format_validation({"step": 0, **results}))
            return results

    def _start_loop(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        setup: Setup,
        stop: StopRequest,
        validation_metrics: Mapping[str, HostMetric] | None,
        stack: ExitStack,
    ) -> FitLoop:
        """Restores or begins, prepares the data, and puts the parts together."""
        config, experiment = self.config, self.experiment
        cadence, meter = config.cadence(), setup.meter()
        schedule = make_schedule(model.lr_scheduler, setup.adamw.lr)
        own = self._checkpoints if experiment.resume_if_exists else None
        other = experiment.resume_from_checkpoint
        restored = restore(setup.layout, own, Path(other) if other else None, self.run_dir)
        groups = (
            setup.sharding.data_parallel_size
            if restored is None
            else int(restored.progress["groups"])
        )
        setup.prepare_data(model, datamodule, groups)
        start = begin(model, setup) if restored is None else go_on(restored)
        log.info(setup.describe(groups))
        metrics = self._open_metrics(model, datamodule)
        stack.callback(metrics.close)
        has_validation = config.limit_val_batches is None or config.limit_val_batches > 0
        validator = self._validator(model, validation_metrics, stop)
        return FitLoop(
            parts=Parts(
                model=model,
                datamodule=datamodule,
                batches=datamodule.train_batches(start.progress.data),
                programs=setup.programs(model, meter),
                schedule=schedule,
                cadence=cadence,
                validator=validator if has_validation else None,
                checkpointer=self._open_checkpointer(start.frozen, stack),
                checkpoint_params=experiment.checkpoint_callback_params,
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

    def _validator(
        self,
        model: TrainableModel,
        metrics: Mapping[str, HostMetric] | None,
        stop: StopRequest | None = None,
    ) -> Validator:
        return Validator(
            host_metrics=model.validation_metrics if metrics is None else metrics,
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


def exp_manager(trainer: Trainer, cfg: Mapping[str, Any] | None = None) -> Path | None:
    """Gives a trainer its run directory, checkpoints and loggers from an `exp_manager` block.

    Returns the run directory, None without a block. Raises SettingsError for what does not fit.
    """
    return None if cfg is None else trainer.use_experiment(cfg)


def _shortest(*limits_s: float | None) -> float | None:
    given = [limit for limit in limits_s if limit is not None]
    return min(given) if given else None
