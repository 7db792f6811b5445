"""Metrics of a run: rows of metrics.jsonl, tensorboard and wandb, and the line on the terminal."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechlm2_jax.settings import SettingsError

log = logging.getLogger(__name__)
Row = dict[str, Any]


class MetricsLog:
    """Writes each row to every place that was asked for. Rows are complete once written."""

    def __init__(
        self,
        path: Path | None,
        *,
        tensorboard: Path | None = None,
        wandb: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self._file = path.open("a", encoding="utf-8") if path is not None else None
        self._tensorboard = _open_tensorboard(tensorboard) if tensorboard is not None else None
        self._wandb = _open_wandb(wandb, settings or {}) if wandb is not None else None

    def write(self, row: Row) -> None:
        """Adds one row; it has `step`. What is not a finite number becomes null."""
        row = {key: _finite(value) for key, value in row.items()}
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Finishes what is being written."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def drop_rows_after(path: Path, step: int) -> None:
    """Removes rows of steps that a resumed run will take again, and a row cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
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


def format_validation(row: Row) -> str:
    """The line for a validation row."""
    metrics = [f"{name} {value:.4f}" for name, value in row.items() if name.startswith("val_")]
    return f"step {row['step']}  " + ("  ".join(metrics) or "no validation data")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(folder: Path) -> Any:
    from tensorboardX import SummaryWriter  # slow to import, and only wanted here

    return SummaryWriter(str(folder))


def _open_wandb(arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  an optional extra
    except ImportError:
        raise SettingsError(
            "exp_manager.create_wandb_logger needs wandb: pip install 'speechlm2_jax[wandb]'"
        ) from None
    return wandb.init(config=dict(settings), **arguments)
