"""The end of a run: the marker that scripts wait for, and the exit code."""

import json
import time
from pathlib import Path

import jax

from speechlm2_jax.exit_codes import FINISHED, MARKER, UNFINISHED
from speechlm2_jax.training.run.run_state import FitResult


def mark(run_dir: Path | None, result: FitResult) -> None:
    """Writes the marker of a finished run, on the first process, unless it is there already."""
    if run_dir is None or jax.process_index() != 0 or not result.is_finished:
        return
    path = run_dir / MARKER
    if path.exists():
        return
    values = {"step": result.step, "reason": result.reason}
    values |= {"time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    draft = path.with_name(f".{MARKER}")
    draft.write_text(json.dumps(values) + "\n", encoding="utf-8")
    draft.replace(path)


def unmark(run_dir: Path | None) -> None:
    """Removes the marker, on the first process: the run goes on."""
    if run_dir is not None and jax.process_index() == 0:
        (run_dir / MARKER).unlink(missing_ok=True)


def exit_code(result: FitResult) -> int:
    """The exit code of a process whose call of `fit` ended."""
    return FINISHED if result.is_finished else UNFINISHED
