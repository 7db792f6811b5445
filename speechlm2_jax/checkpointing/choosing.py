"""Chooses one step among the checkpoints of a run. It imports neither JAX nor Orbax."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from speechlm2_jax.checkpointing.checksums import DamagedError, verify
from speechlm2_jax.checkpointing.folders import step_folders
from speechlm2_jax.checkpointing.ranking import Ranking, read_ranking

Which = Literal["best_else_last", "best", "last"]


class LayoutError(ValueError):
    """A readable checkpoint that holds other variables than the model has."""


def intact_step(run: Path, which: Which | int = "best_else_last") -> Path | None:
    """The step that `load_weights` would read; None if all are damaged. Logs nothing."""
    steps = step_folders(run)
    while steps:
        step = choose(steps, which)
        try:
            verify(step)
            return step
        except DamagedError:
            steps.remove(step)
    return None


def choose(steps: Sequence[Path], which: Which | int) -> Path:
    """The step that `which` names. Raises FileNotFoundError if it is not among them."""
    if which == "last":
        return steps[0]
    if isinstance(which, int):
        for step in steps:
            if int(step.name) == which:
                return step
        raise FileNotFoundError(f"step {which} is not kept; the kept steps are {_names(steps)}")
    ranking = ranking_of(steps)
    by_step = {int(step.name): step for step in steps}
    kept = {step: values for step, values in ranking.metrics.items() if step in by_step}
    best = ranking.retention.best(kept)
    if best:
        return by_step[best[0]]
    if which == "best":
        raise FileNotFoundError(
            f"none of the steps {_names(steps)} has a {ranking.retention.monitor}"
        )
    return steps[0]


def ranking_of(steps: Sequence[Path]) -> Ranking:
    """The ranking beside the steps of one run."""
    return read_ranking(steps[0].parent)


def _names(steps: Iterable[Path]) -> str:
    return ", ".join(step.name for step in steps)
