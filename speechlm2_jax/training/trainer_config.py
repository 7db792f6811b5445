"""The `trainer:` block, with the key names of Lightning's Trainer."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from speechlm2_jax.settings import Refusal, SettingsError
from speechlm2_jax.training.intervals import Intervals, resolve_validation_interval

COMPUTE_DTYPES: Mapping[str, Any] = {
    "32": jnp.float32,
    "32-true": jnp.float32,
    "bf16": jnp.bfloat16,
    "bf16-true": jnp.bfloat16,
    "bf16-mixed": jnp.bfloat16,
    "bf16-flash": jnp.bfloat16,
    "bf16-automodel": jnp.bfloat16,
}
SIXTEEN_BIT = ("16", "16-true", "16-mixed", "fp16-flash", "fp16-automodel")
PLATFORMS: Mapping[str, str | None] = {
    "auto": None,
    "cpu": "cpu",
    "gpu": "gpu",
    "cuda": "gpu",
    "tpu": "tpu",
}
_AUTO = (-1, "auto", "-1")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train. Batches are micro-batches, steps are optimizer steps, as in Lightning."""

    accelerator: str = "auto"
    """auto, cpu, gpu (cuda) or tpu."""
    devices: int | str | tuple[int, ...] = "auto"
    """The number of devices, or a list of their indices; -1 and auto mean all."""
    num_nodes: int = 1
    strategy: object = "auto"
    """A name, a block with `_target_`, or a strategy (strategies.py)."""
    precision: str | int = "32-true"
    """32-true; bf16-true, bf16-mixed, and NeMo's bf16-flash and bf16-automodel (bf16 compute,
    trained parameters fp32)."""
    max_steps: int = -1
    """Optimizer steps; -1: no limit."""
    max_epochs: int | None = None
    """Epochs of `limit_train_batches`; -1: no limit."""
    max_time: str | Mapping[str, int] | None = None
    """Wall time of this process: DD:HH:MM:SS, or days, hours, minutes, seconds."""
    limit_train_batches: int | float | None = None
    """Micro-batches of an epoch; null: endless."""
    limit_val_batches: int | float | None = None
    """Batches of each validation set, or a fraction of the set; 0: no validation."""
    val_check_interval: int | float | None = None
    """Micro-batches between validations, or a fraction of an epoch."""
    check_val_every_n_epoch: int | None = 1
    """null: `val_check_interval` counts across epochs."""
    num_sanity_val_steps: int = 2
    """Batches of each set that are validated before the first step of a new run; -1: all."""
    num_val_samples: int = 3
    """Sample hypotheses of each validation set that are shown."""
    validation_metrics: tuple[str, ...] = ("wer",)
    """Metrics of generated text in validation, each to monitor as `val_NAME`: wer, cer, bleu, chrf,
    intent, mcq, instruction; and perplexity, of the references. Duplex models have scores of
    their own."""
    log_every_n_steps: int = 50
    enable_progress_bar: bool = True
    """Whether to show a progress bar on a terminal. The log is written either way."""
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    """Largest global gradient norm; null or 0: no clipping."""
    remat: str | Mapping[str, str] = "full"
    """What the backward pass recomputes: full, dots (all but matmuls with weights) or none;
    for the whole model, or by component (llm, perception)."""
    default_root_dir: str | None = None
    """The run directory if exp_manager sets none."""
    seed: int = 42
    """Seed of dropout and SpecAugment masks in the step. The data has its own seed."""
    compilation_cache_dir: str | None = "auto"
    """Folder in which compiled programs are kept between runs; null: they are not kept."""

    watchdog_s: float | None = 1800.0
    """Seconds without progress after which the process writes all stacks and exits with 70; time of
    compiling does not count, and the step after it may take four times as long. null: no limit."""
    profile_steps: tuple[int, int] | None = None
    """First and last optimizer step of a trace, written to `profile/` in the run's folder."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "logger": "exp_manager chooses the loggers",
        "enable_checkpointing": "exp_manager.create_checkpoint_callback decides",
        "use_distributed_sampler": "every host runs the same sampler and reads its own groups",
        "replace_sampler_ddp": "every host runs the same sampler and reads its own groups",
        "enable_model_summary": "the parameter counts are printed at the start",
        "benchmark": "XLA chooses its kernels when it compiles",
        "deterministic": "a compiled program gives the same result each time on the same devices",
        "inference_mode": "validation takes no gradients",
        "sync_batchnorm": "batch-norm statistics are over the global batch",
        "limit_test_batches": "evaluate.py runs test sets",
        "limit_predict_batches": "evaluate.py writes predictions",
        "reload_dataloaders_every_n_epochs": "the sampler reshuffles in each pass",
        "detect_anomaly": "non-finite steps are always found, skipped and reported",
        "barebones": "switches off overhead of Lightning that does not exist here",
        "min_epochs": "only early stopping reads it",
        "min_steps": "only early stopping reads it",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "callbacks": "Lightning callbacks cannot run here",
        "plugins": "Lightning plugins cannot run here",
        "profiler": "Lightning profilers cannot run here; give +trainer.profile_steps=[10,12]",
        "fast_dev_run": "set max_steps and limit_val_batches instead",
        "overfit_batches": "set limit_train_batches, and data with few examples, instead",
        "gradient_clip_algorithm": ("only the global norm is clipped", "norm"),
    }

    def __post_init__(self) -> None:
        precision = str(self.precision)
        if precision in SIXTEEN_BIT:
            raise ValueError(
                f"precision={precision} (16-bit float) is not supported: it overflows where bf16 "
                "does not; use bf16-true"
            )
        if precision not in COMPUTE_DTYPES:
            choices = ", ".join(COMPUTE_DTYPES)
            raise ValueError(f"precision={precision} is not supported; choose one of {choices}")
        if self.accelerator not in PLATFORMS:
            raise ValueError(f"accelerator={self.accelerator!r}; choose one of {list(PLATFORMS)}")
        if self.accumulate_grad_batches < 1 or self.log_every_n_steps < 1:
            raise ValueError("accumulate_grad_batches and log_every_n_steps must be at least 1")
        if (
            self.profile_steps is not None
            and not 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise ValueError(
                f"profile_steps={list(self.profile_steps)}: give the first and the last step, "
                "counted from 1"
            )
        if self.watchdog_s is not None and not 0 < self.watchdog_s < math.inf:
            raise ValueError(f"watchdog_s={self.watchdog_s} must be positive; null: no limit")
        if self.num_val_samples < 0:
            raise ValueError(f"num_val_samples={self.num_val_samples} must not be negative")
        if (self.gradient_clip_val or 0) < 0:
            raise ValueError(f"gradient_clip_val={self.gradient_clip_val} must not be negative")
        if self.check_val_every_n_epoch is not None and self.check_val_every_n_epoch < 1:
            raise ValueError("check_val_every_n_epoch must be at least 1, or null")
        self.epoch_batches  # noqa: B018  raises ValueError for an invalid limit_train_batches
        self.time_limit_s  # noqa: B018  raises ValueError for an invalid max_time

    @property
    def epoch_batches(self) -> int | None:
        """Micro-batches of an epoch, None if endless."""
        limit = self.limit_train_batches
        if limit is None or (isinstance(limit, float) and limit == 1.0):
            return None
        if isinstance(limit, float):
            raise ValueError(
                f"limit_train_batches={limit} is a fraction of an epoch, but training data is "
                "endless; give a number of micro-batches (an integer)"
            )
        if limit < 1:
            raise ValueError("limit_train_batches must be at least 1; Trainer.validate validates")
        return limit

    @property
    def validates(self) -> bool:
        """False if `limit_val_batches` is 0: then no validation runs."""
        return self.limit_val_batches is None or self.limit_val_batches > 0

    @property
    def time_limit_s(self) -> float | None:
        """Seconds after which this process saves and stops."""
        return None if self.max_time is None else parse_duration_s(self.max_time)

    @property
    def compute_dtype(self) -> Any:
        """Dtype of activations and of frozen parameters."""
        return COMPUTE_DTYPES[str(self.precision)]

    def matmul_precision(self) -> AbstractContextManager[Any]:
        """A context manager: full fp32 matmuls if the precision is fp32.

        On accelerators JAX by default computes fp32 matmuls in TF32 or bf16 passes.
        """
        is_fp32 = self.compute_dtype == jnp.float32
        return jax.default_matmul_precision("highest") if is_fp32 else nullcontext()

    def intervals(self) -> Intervals:
        """When to validate and to end. Raises SettingsError if the run has no end."""
        max_steps = None if self.max_steps < 0 else self.max_steps
        max_epochs = None if (self.max_epochs or -1) < 0 else self.max_epochs
        if max_steps is None and max_epochs is None and self.max_time is None:
            raise SettingsError("trainer.max_steps: give the number of optimizer steps to train")
        if max_epochs is not None and self.epoch_batches is None:
            raise SettingsError(
                "trainer.max_epochs needs an integer trainer.limit_train_batches, the length of "
                "an epoch; training data is endless"
            )
        across_epochs = self.check_val_every_n_epoch is None
        return Intervals(
            max_steps=max_steps,
            max_epochs=max_epochs,
            accumulate=self.accumulate_grad_batches,
            epoch_batches=self.epoch_batches,
            validate_every=resolve_validation_interval(
                self.val_check_interval, self.epoch_batches, across_epochs=across_epochs
            ),
            across_epochs=across_epochs,
            every_n_epochs=self.check_val_every_n_epoch or 1,
        )

    def choose_devices(self) -> list[jax.Device]:
        """The devices to train on. Raises SettingsError if there are too few."""
        found = self._devices_of_platform()
        if self.num_nodes > jax.process_count():
            raise SettingsError(
                f"trainer.num_nodes={self.num_nodes} but {jax.process_count()} process runs; start "
                "one per node"
            )
        if self.devices in _AUTO:
            return found
        if jax.process_count() > 1:
            self._check_devices_of_all(len(found))
            return found
        if isinstance(self.devices, tuple):
            if max(self.devices, default=0) >= len(found) or not self.devices:
                raise SettingsError(
                    f"trainer.devices={list(self.devices)}: there are {len(found)} devices"
                )
            return [found[i] for i in self.devices]
        count = _whole_number(self.devices)
        if not 1 <= count <= len(found):
            raise SettingsError(
                f"trainer.devices={self.devices}: there are {len(found)} devices; -1 takes all"
            )
        return found[:count]

    def _check_devices_of_all(self, found: int) -> None:
        """Raises SettingsError unless `devices` per node are all devices of the processes."""
        each = _whole_number(self.devices)
        if each * self.num_nodes != found:
            raise SettingsError(
                f"trainer.devices={self.devices} on trainer.num_nodes={self.num_nodes} is not the "
                f"{found} devices that {jax.process_count()} processes have; -1 takes all"
            )

    def _devices_of_platform(self) -> list[jax.Device]:
        platform = PLATFORMS[self.accelerator]
        if platform is None:
            return jax.devices()
        try:
            return jax.devices(platform)
        except RuntimeError:
            raise SettingsError(
                f"trainer.accelerator={self.accelerator} but JAX sees only "
                f"{jax.default_backend()} devices; install JAX for it, or set accelerator=auto"
            ) from None


def _whole_number(value: object) -> int:
    """The number that a setting names; 0 for anything else."""
    return int(str(value)) if str(value).isdigit() else 0


def parse_duration_s(value: str | Mapping[str, int]) -> float:
    """Seconds of a duration: DD:HH:MM:SS, or a mapping of days, hours, minutes, seconds.

    Raises ValueError for another form.
    """
    if isinstance(value, Mapping):
        parts = dict(value)
        amounts = [parts.pop(unit, 0) for unit in ("days", "hours", "minutes", "seconds")]
        is_known = not parts
    else:
        pieces = value.split(":")
        is_known = len(pieces) == 4 and all(piece.isdigit() for piece in pieces)
        amounts = [int(piece) for piece in pieces] if is_known else []
    if not is_known:
        raise ValueError(f"duration {value!r} must be DD:HH:MM:SS, such as 00:03:50:00")
    days, hours, minutes, seconds = amounts
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
