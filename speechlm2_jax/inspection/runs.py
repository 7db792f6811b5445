"""What the run directories in a folder hold: state, last and best values, and curves."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm2_jax.data.json_lines import object_of_line
from speechlm2_jax.exit_codes import MARKER
from speechlm2_jax.object_store.folders import address_of
from speechlm2_jax.settings import SettingsError

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
SHOWN = ("loss", "val_loss", "val_wer", "tokens_per_s_per_device")
"""Metrics that come first, in this order."""
HIDDEN = ("step", "skipped", "dropped", "goodput")
RISING = frozenset(
    "acc accuracy bleu chrf f1 instruction intent mcq precision recall success tokens_per_s".split()
)
"""Words of names of metrics of which more is better; of all others less is."""
_MOST_STEPS = 1 << 53
_SHOWN = 120
"""Characters of a reason that are told."""
MOST_COLUMNS = 4
"""Validation metrics in the table of a terminal."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run directory."""

    path: Path
    is_finished: bool
    max_steps: int | None
    """None: not known."""
    config_problem: str | None = None
    """Why the settings cannot be read, if they are there."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Metric -> (step, value) in order of the steps; values are finite."""
    hours: float = 0.0
    """Wall time of all starts that wrote their last row."""
    damaged: int = 0
    """Lines that are no rows, but for the last, which may be being written."""
    is_diverged: bool = False
    """Whether the newest loss is no finite number."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return max((points[-1][0] for points in self.curves.values() if points), default=0)

    @property
    def state(self) -> str:
        """`finished`, or how far it is."""
        steps = f"step {self.step}" + (f" of {self.max_steps}" if self.max_steps else "")
        state = "finished" if self.is_finished else steps
        return f"{state}, loss is not finite" if self.is_diverged else state

    def last(self, metric: str) -> float | None:
        """The newest value."""
        points = self.curves.get(metric)
        return points[-1][1] if points else None

    def best(self, metric: str) -> float | None:
        """The best value."""
        values = [value for _, value in self.curves.get(metric, ())]
        if not values:
            return None
        return max(values) if more_is_better(metric, self.curves) else min(values)


def more_is_better(name: str, names: Container[str] = ()) -> bool:
    """Whether a higher value of a metric is the better one; `names` are all metrics of the run.

    Validation writes `val_<metric>_<set>` for each set, and `val_<metric>`, their mean. The name of
    the set does not count, whatever it is.
    """
    words = name.split("_")
    starts = ("_".join(words[:count]) for count in range(2, len(words)))
    metric = next((start for start in starts if start in names), name)
    return any(f"_{word}_" in f"_{metric}_" for word in RISING)


def find_runs(places: Sequence[Path]) -> list[RunRecord]:
    """The runs among folders and in them, the newest last.

    Raises SettingsError for a place that is not there, and if there is no run.
    """
    paths: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise SettingsError(f"{place}: no such folder")
        found = [place] if (place / METRICS).is_file() else []
        below = (path for path in place.glob(f"**/{METRICS}") if path.is_file())
        found += [path.parent for path in below if path.parent != place]
        paths |= dict.fromkeys(found)
    if not paths:
        where = ", ".join(map(str, places))
        raise SettingsError(f"{where}: no run there (a run directory has {METRICS})")
    return [read_run(path) for path in sorted(paths, key=lambda p: (p / METRICS).stat().st_mtime)]


def read_run(path: Path) -> RunRecord:
    """Reads one run directory. A last line that is being written is left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    seconds, is_diverged = 0.0, False
    rows, damaged = _rows(path / METRICS)
    for row in rows:
        seconds += _finite(row.get("time_total_s")) or 0.0
        if "loss" in row:
            is_diverged = _finite(row["loss"]) is None
        for name, own in row.items():
            value = _finite(own)
            if value is not None and name not in HIDDEN and not name.startswith("time_"):
                curves.setdefault(name, []).append((row["step"], value))
    max_steps, config_problem = _max_steps(path / CONFIG)
    return RunRecord(
        path=path,
        is_finished=(path / MARKER).exists(),
        max_steps=max_steps,
        config_problem=config_problem,
        curves=curves,
        hours=seconds / 3600,
        damaged=damaged,
        is_diverged=is_diverged,
    )


def _finite(value: object) -> float | None:
    """A number as float; None for what is none, is not finite or is too large."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file, and the number of damaged lines before its last."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    lines = path.read_bytes().split(b"\n")
    for n, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and n < len(lines):
            damaged += 1
    return rows, damaged


def _row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if it is damaged."""
    try:
        row = object_of_line(METRICS, line)
    except SettingsError:
        return None
    step = row.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MOST_STEPS
    return row if is_step else None


def _max_steps(path: Path) -> tuple[int | None, str | None]:
    """Steps that a run is to have, if its settings tell, and why they cannot be read, if so."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return None, " ".join(str(error).split())[:_SHOWN]
    trainer = settings.get("trainer") if isinstance(settings, dict) else None
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
    return steps if is_count else None, None


def metrics_of(runs: Sequence[RunRecord]) -> list[str]:
    """All metrics of the runs: those of SHOWN first, then validation, then the others."""
    names = {name for run in runs for name in run.curves}
    first = [name for name in SHOWN if name in names]
    rest = sorted(names - set(first), key=lambda name: (not name.startswith("val_"), name))
    return first + rest


def validation_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """All validation metrics of the runs, in the order of their columns."""
    return [name for name in metrics_of(runs) if name.startswith("val_")]


def table(runs: Sequence[RunRecord], most: int | None = None) -> list[list[str]]:
    """A head and a row for each run: state, hours, the last loss and the best validation values.

    `most` is the number of validation metrics; None means all.
    """
    validation = validation_metrics(runs)[:most]
    head = ["run", "state", "hours", "loss", *(f"best {name}" for name in validation)]
    names = short_names(runs)
    rows = [
        [
            names[run.path],
            run.state,
            f"{run.hours:.2f}" if run.hours else "–",
            number(run.last("loss")),
            *(number(run.best(name)) for name in validation),
        ]
        for run in runs
    ]
    return [head, *rows]


def short_names(runs: Sequence[RunRecord]) -> dict[Path, str]:
    """The paths, or addresses, of the runs without the folders that all share."""
    addresses = [address_of(run.path) for run in runs]
    parts = [
        tuple(address.split("/")) if address else run.path.absolute().parts
        for run, address in zip(runs, addresses, strict=True)
    ]
    shared = 0
    shortest = min(map(len, parts))
    while shared < shortest - 1 and len({part[shared] for part in parts}) == 1:
        shared += 1
    return {run.path: "/".join(part[shared:]) for run, part in zip(runs, parts, strict=True)}


def number(value: float | None) -> str:
    """A number for people: four digits."""
    return "–" if value is None else f"{value:.4g}"
