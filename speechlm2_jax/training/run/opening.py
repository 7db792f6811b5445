"""From a call of `fit` to its first step: restore or begin, plan the data, open what is written."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from speechlm2_jax import processes
from speechlm2_jax.checkpointing import CHECKPOINTS, Checkpointer, write_checksums
from speechlm2_jax.console import ProgressBar
from speechlm2_jax.training.exp_manager import ExpManagerConfig, SummaryWriterParams
from speechlm2_jax.training.protocol import (
    DataSource,
    HostMetric,
    Scoring,
    TrainableModel,
    Variables,
)
from speechlm2_jax.training.run import directory as run_directory
from speechlm2_jax.training.run.changed_settings import check_resumed
from speechlm2_jax.training.run.metrics_log import MetricsLog, Wandb
from speechlm2_jax.training.run.preparation import Setup, Start, initialize, restore, resume
from speechlm2_jax.training.run.profiling import FOLDER, StepProfiler
from speechlm2_jax.training.run.run_state import RunContext
from speechlm2_jax.training.run.stopping import StopRequest
from speechlm2_jax.training.run.throughput import Throughput
from speechlm2_jax.training.schedules import make_schedule
from speechlm2_jax.training.trainer_config import TrainerConfig
from speechlm2_jax.training.validation import Validator


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a call of `fit` was given, and what it opens."""

    config: TrainerConfig
    experiment: ExpManagerConfig
    run_dir: Path | None
    model: TrainableModel
    datamodule: DataSource
    setup: Setup
    settings: Mapping[str, Any]
    """Of the whole run."""
    host_metrics: Mapping[str, HostMetric]
    scoring: Scoring | None
    throughput: Throughput
    stop: StopRequest

    def start(self) -> Start:
        """Restores or begins, and lets the data plan its shapes."""
        own = self._checkpoints if self.experiment.resume_if_exists else None
        other = self.experiment.resume_from_checkpoint
        setup, model = self.setup, self.model
        sources = (own, Path(other) if other else None)
        allows = self.experiment.resume_allow_changes
        check_resumed(sources, model, self.settings, allows_changes=allows)
        restored = restore(model, setup.layout, *sources, self.run_dir)
        if restored is None:
            setup.prepare_data(model, self.datamodule, setup.sharding.data_parallel_size)
            return initialize(model, setup)
        setup.prepare_data(model, self.datamodule, int(restored.progress["groups"]))
        return resume(restored)

    def parts(self, start: Start, stack: ExitStack) -> RunContext:
        """Opens what the loop works with, and describes the run in its directory.

        `stack` closes what is opened.
        """
        config, intervals, model = self.config, self.config.intervals(), self.model
        metrics = self._open_metrics()
        stack.callback(metrics.close)
        bar = ProgressBar(
            total=intervals.last_step,
            done=start.progress.step,
            is_wanted=config.enable_progress_bar and jax.process_index() == 0,
        )
        stack.callback(bar.close)
        traces = (self.run_dir or Path()) / FOLDER
        profiler = stack.enter_context(StepProfiler(config.profile_steps, traces).closing())
        planned = len(self.datamodule.training_shapes())
        parts = RunContext(
            model=model,
            datamodule=self.datamodule,
            batches=self.datamodule.train_batches(start.progress.data),
            programs=self.setup.programs(model, self.throughput, planned),
            schedule=make_schedule(model.lr_scheduler, self.setup.adamw.lr),
            intervals=intervals,
            validator=self._validator() if config.validates else None,
            checkpointer=self._open_checkpointer(start.frozen, stack),
            checkpoint_params=self.experiment.checkpoint_callback_params,
            metrics_log=metrics,
            throughput=self.throughput,
            stop=self.stop,
            bar=bar,
            profiler=profiler,
            log_every_n_steps=config.log_every_n_steps,
            sanity_batches=config.num_sanity_val_steps,
        )
        self._describe()
        return parts

    def _describe(self) -> None:
        if self.run_dir is not None and jax.process_index() == 0:
            run_directory.describe(self.run_dir, self.settings)
            graphdef = self.run_dir / run_directory.MODEL
            self.model.save_definition(graphdef)
            write_checksums(graphdef, {})

    @property
    def _checkpoints(self) -> Path | None:
        """Where checkpoints lie, None if nothing is saved."""
        is_kept = self.experiment.create_checkpoint_callback
        return self.run_dir / CHECKPOINTS if self.run_dir is not None and is_kept else None

    def _open_checkpointer(self, frozen: Variables, stack: ExitStack) -> Checkpointer | None:
        if self._checkpoints is None:
            return None
        retention = self.experiment.checkpoint_callback_params.retention()
        checkpointer = Checkpointer(self._checkpoints, retention)
        stack.callback(checkpointer.close)
        has_frozen = processes.broadcast_text(str(checkpointer.has_frozen)) == str(True)
        checkpointer.save_frozen(frozen, has_frozen)
        return checkpointer

    def _open_metrics(self) -> MetricsLog:
        if self.run_dir is None or jax.process_index() != 0:
            return MetricsLog(None)
        experiment, folder = self.experiment, self.run_dir
        writer = experiment.summary_writer_kwargs or SummaryWriterParams()
        arguments = experiment.wandb_logger_kwargs or {}
        return MetricsLog(
            folder / run_directory.METRICS,
            tensorboard=writer.folder(folder) if experiment.create_tensorboard_logger else None,
            writer_options=writer.options(),
            wandb=Wandb(run_dir=folder, arguments=arguments, settings=self.settings)
            if experiment.create_wandb_logger
            else None,
        )

    def _validator(self) -> Validator:
        return Validator(
            host_metrics=self.host_metrics,
            scoring=self.scoring,
            nemo_exact=self.model.nemo_exact,
            limit=self.config.limit_val_batches,
            samples=self.config.num_val_samples,
            should_stop=lambda: self.stop.poll() is not None,
            waiting=lambda: self.throughput.measure("validation_data_wait"),
        )
