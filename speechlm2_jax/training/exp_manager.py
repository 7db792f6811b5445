"""The `exp_manager:` block: the run directory, what is kept in it, and resuming."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from speechlm2_jax import processes
from speechlm2_jax.checkpointing import CHECKPOINTS, Retention, step_folders
from speechlm2_jax.object_store.folders import is_address, local_path, shown, working_folder
from speechlm2_jax.object_store.objects import ObjectStore
from speechlm2_jax.settings import Refusal, SettingsError
from speechlm2_jax.training.run.metrics_log import require_wandb, wandb_arguments
from speechlm2_jax.training.trainer_config import parse_duration_s

DEFAULT_EXP_DIR = "runs"


def run_folder(name: str) -> Path:
    """The folder that a run directory's name means: a path, or that of an address of a store."""
    return working_folder(name) if is_address(name) else local_path(name)


@dataclass(frozen=True, kw_only=True)
class CheckpointParams:
    """NeMo's `checkpoint_callback_params`. The latest checkpoints are always kept."""

    monitor: str | None = "val_loss"
    mode: Literal["min", "max"] = "min"
    save_top_k: int = 3
    """How many of the best checkpoints are kept as well; 0: none, -1: every checkpoint."""
    keep_latest: int = 2
    """How many of the latest checkpoints are kept. With 2, one is left if the last is damaged."""
    every_n_train_steps: int | None = None
    """Also save every so many optimizer steps."""
    every_n_epochs: int | None = 1
    """Save after the validations of every n-th epoch; 0 or null: after none."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "filename": "a checkpoint is a folder named by its step",
        "prefix": "a checkpoint is a folder named by its step",
        "postfix": "a checkpoint is a folder named by its step",
        "auto_insert_metric_name": "a checkpoint is a folder named by its step",
        "verbose": "every save is a line in train.log",
        "save_last": "the latest checkpoints are always kept (keep_latest)",
        "async_save": "checkpoints are always written in the background",
        "save_on_train_epoch_end": "validation comes first, so that its metric is saved too",
        "save_best_model": "from_pretrained takes the best of a run directory",
        "save_nemo_on_train_end": "no .nemo file is written; save_pretrained exports a model",
        "model_parallel_size": "checkpoints hold whole arrays, whatever the mesh",
        "save_last_n_optim_states": "every checkpoint can be resumed",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "dirpath": "checkpoints lie in the run directory; set exp_manager.explicit_log_dir",
        "filepath": "checkpoints lie in the run directory; set exp_manager.explicit_log_dir",
        "always_save_nemo": "no .nemo file is written; save_pretrained exports a model",
        "save_weights_only": "a checkpoint without its optimizer could not be resumed",
        "train_time_interval": "set every_n_train_steps",
    }

    def __post_init__(self) -> None:
        if self.save_top_k < -1 or (self.every_n_train_steps or 0) < 0:
            raise ValueError("save_top_k must be at least -1, every_n_train_steps at least 0")
        if self.keep_latest < 1:
            raise ValueError("keep_latest must be at least 1")

    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        if self.monitor is None:
            return Retention(top_k=min(self.save_top_k, 0), latest=self.keep_latest)
        return Retention(
            monitor=self.monitor,
            mode=self.mode,
            top_k=self.save_top_k,
            latest=self.keep_latest,
        )

    def saves_at_step(self, step: int) -> bool:
        """True if `every_n_train_steps` asks for a checkpoint at `step`."""
        return bool(self.every_n_train_steps) and step % (self.every_n_train_steps or 1) == 0

    def saves_after_validation(self, epoch: int) -> bool:
        """True if a validation in `epoch` (from 0) is followed by a checkpoint."""
        return bool(self.every_n_epochs) and (epoch + 1) % (self.every_n_epochs or 1) == 0


@dataclass(frozen=True, kw_only=True)
class SummaryWriterParams:
    """NeMo's `summary_writer_kwargs`: arguments of TensorBoard's SummaryWriter."""

    sub_dir: str | None = None
    """A folder below tensorboard/."""
    max_queue: int = 10
    """Largest number of rows that wait to be written."""
    flush_secs: int = 30
    """Rows are written after this many seconds at the latest."""
    filename_suffix: str = ""
    """Suffix of the file names."""
    purge_step: int | None = None
    """Rows of an earlier run from this step on are hidden."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "name": "the writer's folder is tensorboard/ of the run directory",
        "version": "the writer's folder is tensorboard/ of the run directory",
        "comment": "names a folder that is not used here",
        "default_hp_metric": "config.yaml has the settings",
        "log_graph": "there is no torch module to draw",
        "write_to_disk": "the writer always writes",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "log_dir": "rows lie in the run directory; set exp_manager.explicit_log_dir",
        "save_dir": "rows lie in the run directory; set exp_manager.explicit_log_dir",
        "prefix": "metrics have one name everywhere",
    }

    def folder(self, run_dir: Path) -> Path:
        """The folder to which rows are written."""
        return run_dir / "tensorboard" / (self.sub_dir or "")

    def options(self) -> dict[str, Any]:
        """Arguments of the SummaryWriter."""
        return {
            "max_queue": self.max_queue,
            "flush_secs": self.flush_secs,
            "filename_suffix": self.filename_suffix,
            "purge_step": self.purge_step,
        }


_OTHER_LOGGERS = "writes to a service that is not supported; use tensorboard or wandb"
_FAULTS = "NVIDIA's resiliency tools are not supported; resume_if_exists restarts a run"


@dataclass(frozen=True, kw_only=True)
class ExpManagerConfig:
    """NeMo's `exp_manager` block."""

    explicit_log_dir: str | None = None
    """The run directory itself; otherwise exp_dir/name/version."""
    exp_dir: str | None = None
    name: str | None = None
    version: str | None = None
    use_datetime_version: bool = True
    resume_if_exists: bool = False
    resume_ignore_no_checkpoint: bool = False
    """With resume_if_exists: start a new run if there is no checkpoint, instead of an error."""
    resume_from_checkpoint: str | None = None
    """A run, or one of its steps, to resume from if this run has no checkpoint of its own."""
    resume_allow_changes: bool = False
    """Resume even if changed settings give the weights another meaning (docs/training.md)."""
    create_checkpoint_callback: bool = True
    """False: nothing is saved."""
    checkpoint_callback_params: CheckpointParams = CheckpointParams()
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: Mapping[str, object] | None = None
    """Arguments of wandb.init; also Lightning's offline, save_dir and version."""
    summary_writer_kwargs: SummaryWriterParams | None = None
    max_time_per_run: str | Mapping[str, int] | None = None
    """The process saves and stops after this wall time (DD:HH:MM:SS)."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "log_step_timing": "the log line always has the timing",
        "log_delta_step_timing": "the log line always has the timing",
        "step_timing_kwargs": "the log line always has the timing",
        "log_tflops_per_sec_per_gpu": "the log line always has the model FLOP/s utilisation",
        "create_preemption_callback": "SIGTERM always saves and stops",
        "disable_validation_on_resume": "a resumed run validates when it would have",
        "seconds_to_sleep": "nothing waits for other processes' files",
        "files_to_copy": "config.yaml, command.txt and environment.txt say what ran",
        "resume_past_end": "raise trainer.max_steps to extend a finished run",
        "mlflow_logger_kwargs": _OTHER_LOGGERS,
        "dllogger_logger_kwargs": _OTHER_LOGGERS,
        "clearml_logger_kwargs": _OTHER_LOGGERS,
        "neptune_logger_kwargs": _OTHER_LOGGERS,
        "early_stopping_callback_params": "there is no early stopping",
        "ipl_epoch_stopper_callback_params": "there is no early stopping",
        "straggler_detection_params": _FAULTS,
        "fault_tolerance": _FAULTS,
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "create_mlflow_logger": _OTHER_LOGGERS,
        "create_dllogger_logger": _OTHER_LOGGERS,
        "create_clearml_logger": _OTHER_LOGGERS,
        "create_neptune_logger": _OTHER_LOGGERS,
        "create_early_stopping_callback": "there is no early stopping; the best is kept",
        "create_ipl_epoch_stopper_callback": "there is no early stopping; the best is kept",
        "create_straggler_detection_callback": _FAULTS,
        "create_fault_tolerance_callback": _FAULTS,
        "ema": "an exponential moving average of the weights is not supported",
    }

    def __post_init__(self) -> None:
        self.time_limit_s  # noqa: B018  raises ValueError for an invalid max_time_per_run
        wandb_arguments(self.wandb_logger_kwargs or {})

    @property
    def time_limit_s(self) -> float | None:
        """Seconds after which this process saves and stops."""
        return None if self.max_time_per_run is None else parse_duration_s(self.max_time_per_run)

    def run_dir(self) -> Path:
        """The run directory, chosen by the first process for all.

        If it is named by date, each call gives a new one.
        """
        return run_folder(processes.broadcast_text(self._run_name()))

    def _run_name(self) -> str:
        """The path or address of the run directory."""
        if self.explicit_log_dir:
            return self.explicit_log_dir
        folder = _below(self.exp_dir or DEFAULT_EXP_DIR, self.name or "default")
        if self.version:
            return _below(folder, self.version)
        if self.resume_if_exists:
            return folder
        if self.use_datetime_version:
            return _below(folder, time.strftime("%Y-%m-%d_%H-%M-%S"))
        return _below(folder, f"version_{len(_versions(folder))}")

    def check_loggers(self) -> None:
        """Raises SettingsError if a requested logger is not installed."""
        if self.create_wandb_logger:
            require_wandb()

    def check_resume(self, run_dir: Path) -> None:
        """Raises SettingsError if the run directory does not match the `resume_*` keys."""
        has_steps = bool(step_folders(run_dir / CHECKPOINTS))
        if has_steps and not self.resume_if_exists:
            raise SettingsError(
                f"{shown(run_dir)} holds checkpoints of a run; set "
                "exp_manager.resume_if_exists=true to resume it, or choose another "
                "exp_manager.explicit_log_dir"
            )
        may_start = self.resume_ignore_no_checkpoint or self.resume_from_checkpoint
        if self.resume_if_exists and not has_steps and not may_start:
            raise SettingsError(
                f"{shown(run_dir)} holds no checkpoint to resume; set "
                "exp_manager.resume_ignore_no_checkpoint=true to start anew"
            )
        other = self.resume_from_checkpoint
        if other and not is_address(other) and not step_folders(local_path(other)):
            raise SettingsError(
                f"exp_manager.resume_from_checkpoint={other}: found no checkpoint of a run; to "
                "start from a model's weights, use from_pretrained or model.pretrained_llm"
            )


def _below(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_address(folder) else str(Path(folder, name))


def _versions(folder: str) -> set[str]:
    """The names of the numbered versions of a run."""
    if is_address(folder):
        names = {name.partition("/")[0] for name in ObjectStore(folder).sizes()}
    else:
        names = {path.name for path in local_path(folder).glob("version_*")}
    return {name for name in names if name.startswith("version_")}
