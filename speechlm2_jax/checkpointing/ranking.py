"""Which checkpoints are best, by the validation metrics noted beside them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import xxhash

from speechlm2_jax.checkpointing.checksums import DamagedError, read_checksums
from speechlm2_jax.checkpointing.folders import RANKED, step_folders
from speechlm2_jax.settings import parse_json

RANKING = "ranking.json"
CHECKSUM = "xxh3_128"
_CONSEQUENCE = "no checkpoint counts as best"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: always the latest, and the best by a validation metric."""

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    top_k: int = 1
    """How many of the best stay; -1 keeps every checkpoint."""
    latest: int = 2
    """How many of the latest stay; with 2, one is left if the last is damaged."""

    def score(self, value: float | None) -> float | None:
        """A number that is larger for better values; None for none or a NaN."""
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "max" else -value

    def best(self, metrics: Mapping[int, Mapping[str, float | None]]) -> list[int]:
        """The steps that have the monitored metric, best first, of equals the newest first."""
        scores = {step: self.score(values.get(self.monitor)) for step, values in metrics.items()}
        ranked = [(score, step) for step, score in scores.items() if score is not None]
        return [step for _, step in sorted(ranked, reverse=True)]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The contents of ranking.json."""

    retention: Retention = Retention()
    metrics: dict[int, dict[str, float | None]] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be used; the metrics of existing steps are then unknown."""


def read_ranking(folder: Path) -> Ranking:
    """Reads the ranking of a checkpoints folder; empty if it is not there or damaged.

    Logs nothing.
    """
    try:
        stored = parse_json((folder / RANKING).read_bytes())
        if stored.get(CHECKSUM, checksum := _checksum(stored)) != checksum:
            raise ValueError("it has changed since it was written")
        return Ranking(
            retention=Retention(monitor=stored["monitor"], mode=stored["mode"]),
            metrics={int(step): values for step, values in stored["metrics"].items()},
        )
    except FileNotFoundError:
        if not _is_missed(folder):
            return Ranking()
        return Ranking(problem=f"{folder / RANKING} is missing; {_CONSEQUENCE}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Ranking(problem=f"cannot read {folder / RANKING} ({error}); {_CONSEQUENCE}")


def write_ranking(folder: Path, ranking: Ranking) -> None:
    """Replaces the ranking of a checkpoints folder, in one step."""
    stored = {
        "monitor": ranking.retention.monitor,
        "mode": ranking.retention.mode,
        "metrics": {str(step): values for step, values in ranking.metrics.items()},
    }
    draft = folder / f"{RANKING}.draft"
    draft.write_text(json.dumps({**stored, CHECKSUM: _checksum(stored)}, indent=1))
    draft.replace(folder / RANKING)


def _is_missed(folder: Path) -> bool:
    """Whether the newest checkpoint tells that there was a ranking."""
    try:
        checksums = read_checksums(step_folders(folder)[0])
    except (IndexError, DamagedError):
        return False
    return checksums is not None and RANKED in checksums.notes


def _checksum(stored: Mapping[str, object]) -> str:
    """Of all values but the checksum itself, however they are spaced."""
    values = {name: value for name, value in stored.items() if name != CHECKSUM}
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
