"""Metrics of a run: rows of metrics.jsonl, TensorBoard and W&B, and lines on the terminal."""

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm2_jax.settings import SettingsError, parse_json
from speechlm2_jax.training.protocol import Sample
from speechlm2_jax.training.run.throughput import Pace

log = logging.getLogger(__name__)
Row = dict[str, Any]
Samples = Mapping[str, Sequence[Sample]]
"""Validation set -> sample hypotheses."""
WANDB_ID = "wandb_id"
"""File with the id of the W&B run. A resumed run reads it and appends to the same W&B run."""
WANDB_RENAMED = {"save_dir": "dir", "version": "id"}
"""Arguments of Lightning's WandbLogger -> their names in wandb.init."""
WANDB_REFUSED = {
    "log_model": "checkpoints lie in the run directory and are not uploaded",
    "prefix": "metrics have one name everywhere",
    "experiment": "the W&B run is opened here",
}


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """How to open the W&B run."""

    run_dir: Path
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Arguments of Lightning's WandbLogger or of wandb.init."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings of the run, which W&B shows as its config."""


class MetricsLog:
    """Writes each row to metrics.jsonl, TensorBoard and W&B, as far as they are enabled.

    Each row of metrics.jsonl is flushed, so that a killed run loses no row.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        tensorboard: Path | None = None,
        writer_options: Mapping[str, Any] | None = None,
        wandb: Wandb | None = None,
    ):
        """`tensorboard` is a folder, `writer_options` are tensorboardX.SummaryWriter's."""
        self._wandb = _open_wandb(wandb) if wandb is not None else None
        self._file = path.open("a", encoding="utf-8") if path is not None else None
        self._folder, self._writer_options = tensorboard, dict(writer_options or {})
        self._writer: Any = None

    def write(self, row: Row) -> None:
        """Adds one row, which has the key `step`. NaN and infinities become null."""
        row = {key: _finite(value) for key, value in row.items()}
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if (writer := self._tensorboard()) is not None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def write_samples(self, step: int, samples: Samples) -> None:
        """Adds sample hypotheses, as text in TensorBoard and as tables in W&B."""
        columns = ["id", "reference", "hypothesis"]
        for name, chosen in samples.items():
            cells = [[s.id, s.reference, s.hypothesis] for s in chosen]
            if (writer := self._tensorboard()) is not None:
                writer.add_text(f"val_samples/{name}", _markdown([columns, *cells]), step)
            if self._wandb is not None:
                import wandb  # pyright: ignore[reportMissingImports]  an optional extra

                table = wandb.Table(columns=columns, data=cells)
                self._wandb.log({f"val_samples/{name}": table}, step=step)

    def close(self) -> None:
        """Closes the file, TensorBoard's writer and the W&B run."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _tensorboard(self) -> Any:
        """The writer. It is opened by the first row, as its import is slow."""
        if self._writer is None and self._folder is not None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), **self._writer_options)
        return self._writer


def drop_rows_after(path: Path, step: int) -> None:
    """Removes rows of steps that a resumed run repeats, and an incomplete last row."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = parse_json(line)
        except SettingsError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    draft = path.with_suffix(".draft")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


def format_step(row: Row, max_steps: int | None) -> str:
    """The line for a training row."""
    total = f"/{max_steps}" if max_steps is not None else ""
    parts = [
        f"step {row['step']}{total}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.3e}",
        f"grad norm {row['grad_norm']:.3f}",
        f"{row['tokens_per_s_per_device']:.0f} tokens/s/device",
        "mfu -" if row["mfu"] is None else f"mfu {row['mfu']:.1%}",
        f"data wait {row['data_wait_share']:.1%}",
        f"padding {row['padding']:.1%}",
    ]
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    if row["dropped"]:
        parts.append(f"dropped {row['dropped']}")
    return "  ".join(parts)


def format_progress(loss: float, learning_rate: float, pace: Pace | None) -> str:
    """The text of the progress bar, after the number of the step."""
    parts = [f"loss {loss:.4f}", f"lr {learning_rate:.1e}"]
    if pace is not None:
        parts += [f"{pace.steps_per_s:.2f} steps/s", f"{pace.tokens_per_s:.0f} tokens/s"]
        if pace.left_s is not None:
            parts.append(f"{_clock(pace.left_s)} left")
    return "  ".join(parts)


def format_validation(row: Row) -> str:
    """The line for a validation row."""
    metrics = [f"{name} {value:.4f}" for name, value in row.items() if name.startswith("val_")]
    return f"step {row['step']}  " + ("  ".join(metrics) or "no validation data")


def format_samples(step: int, samples: Samples) -> list[str]:
    """Three lines for each sample."""
    return [
        f"step {step}  {name}  {s.id}\n"
        f"    reference:  {s.reference}\n"
        f"    hypothesis: {s.hypothesis}"
        for name, chosen in samples.items()
        for s in chosen
    ]


def require_wandb() -> None:
    """Raises SettingsError if wandb is not installed."""
    try:
        found = importlib.util.find_spec("wandb")
    except ValueError:  # find_spec raises it for a module without a spec
        found = None
    if found is None:
        raise SettingsError(
            "exp_manager.create_wandb_logger needs wandb: pip install 'speechlm2_jax[wandb]'"
        )


def wandb_arguments(options: Mapping[str, object]) -> dict[str, Any]:
    """Converts arguments of Lightning's WandbLogger, as in NeMo's YAML, to those of wandb.init.

    Raises SettingsError for one that is not supported.
    """
    arguments = dict(options)
    for name, reason in WANDB_REFUSED.items():
        if arguments.pop(name, None):
            raise SettingsError(f"exp_manager.wandb_logger_kwargs.{name}: {reason}; leave it out")
    for name, own in WANDB_RENAMED.items():
        if (value := arguments.pop(name, None)) is not None:
            arguments.setdefault(own, value)
    if arguments.pop("offline", False):
        arguments.setdefault("mode", "offline")
    return arguments


def _finite(value: object) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _open_wandb(run: Wandb) -> Any:
    require_wandb()
    import wandb  # pyright: ignore[reportMissingImports]

    arguments = wandb_arguments(run.arguments)
    kept = run.run_dir / WANDB_ID
    if "id" not in arguments and kept.exists():
        arguments |= {"id": kept.read_text(encoding="utf-8").strip(), "resume": "allow"}
    try:
        opened = wandb.init(**{"dir": str(run.run_dir), "config": dict(run.settings), **arguments})
    except (TypeError, ValueError, wandb.errors.Error) as error:
        raise SettingsError(f"exp_manager.wandb_logger_kwargs: error of W&B: {error}") from error
    kept.write_text(f"{opened.id}\n", encoding="utf-8")
    return opened
