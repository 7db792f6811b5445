"""Opens the outputs of a run: checkpoints, metrics, settings and the model's files."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from speechlm2_jax import processes
from speechlm2_jax.checkpointing import CHECKPOINTS, Checkpointer, write_checksums
from speechlm2_jax.settings import to_plain
from speechlm2_jax.strategies import Strategy
from speechlm2_jax.training.exp_manager import ExpManagerConfig, SummaryWriterParams
from speechlm2_jax.training.protocol import (
    DataSource,
    HasTokenizer,
    KeepsErrors,
    TrainableModel,
    Variables,
)
from speechlm2_jax.training.run import directory as run_directory
from speechlm2_jax.training.run.changed_settings import TOKENIZER
from speechlm2_jax.training.run.metrics_log import MetricsLog, Wandb


def settings_of(
    model: TrainableModel,
    datamodule: DataSource,
    trainer: Mapping[str, Any],
    strategy: object,
    experiment: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings of a run started from Python, as config.yaml holds them."""
    options = dict(trainer)
    if isinstance(strategy, Strategy):
        options["strategy"] = {"_target_": type(strategy).__name__, **to_plain(strategy)}
    return {
        "model": to_plain(model.settings),
        "trainer": to_plain(options),
        "data": to_plain(getattr(datamodule, "settings", {})),
        "exp_manager": to_plain(experiment),
    }


def checkpoints_folder(experiment: ExpManagerConfig, run_dir: Path | None) -> Path | None:
    """The folder of the run's checkpoints; None if none are written."""
    is_written = run_dir is not None and experiment.create_checkpoint_callback
    return run_dir / CHECKPOINTS if run_dir is not None and is_written else None


def open_checkpointer(
    experiment: ExpManagerConfig, run_dir: Path | None, frozen: Variables, stack: ExitStack
) -> Checkpointer | None:
    """Opens the checkpointer, which `stack` closes, and starts saving the frozen parameters."""
    folder = checkpoints_folder(experiment, run_dir)
    if folder is None:
        return None
    checkpointer = Checkpointer(folder, experiment.checkpoint_callback_params.retention())
    stack.push(checkpointer.exit)
    has_frozen = processes.broadcast_text(str(checkpointer.has_frozen)) == str(True)
    checkpointer.save_frozen(frozen, has_frozen)
    return checkpointer


def open_metrics_log(
    experiment: ExpManagerConfig,
    run_dir: Path | None,
    settings: Mapping[str, object],
    stack: ExitStack,
) -> MetricsLog:
    """Opens metrics.jsonl, TensorBoard and W&B, which `stack` closes.

    Only the first process writes.
    """
    if run_dir is None or jax.process_index() != 0:
        return MetricsLog(None)
    writer = experiment.summary_writer_kwargs or SummaryWriterParams()
    arguments = experiment.wandb_logger_kwargs or {}
    metrics_log = MetricsLog(
        run_dir / run_directory.METRICS,
        tensorboard=writer.folder(run_dir) if experiment.create_tensorboard_logger else None,
        writer_options=writer.options(),
        wandb=Wandb(run_dir=run_dir, arguments=arguments, settings=settings)
        if experiment.create_wandb_logger
        else None,
    )
    stack.callback(metrics_log.close)
    return metrics_log


def list_data_errors(run_dir: Path | None, datamodule: DataSource) -> None:
    """Lets the data list what cannot be read in the run directory: a file for each process."""
    if not isinstance(datamodule, KeepsErrors):
        return
    path, process = run_dir and run_dir / run_directory.DATA_ERRORS, jax.process_index()
    datamodule.keep_errors(path and path.with_suffix(f".{process}.jsonl") if process else path)


def write_description(
    run_dir: Path | None, model: TrainableModel, settings: Mapping[str, object]
) -> None:
    """Writes the settings, the environment and all files of the model except the weights."""
    if run_dir is not None and jax.process_index() == 0:
        run_directory.describe(run_dir, settings)
        folder = run_dir / run_directory.MODEL
        model.save_definition(folder)
        contents = model.tokenizer.contents if isinstance(model, HasTokenizer) else None
        write_checksums(folder, {} if contents is None else {TOKENIZER: contents})
