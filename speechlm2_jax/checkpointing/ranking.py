"""Which checkpoints are best, by the validation metrics noted beside them."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)

RANKING = "ranking.json"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: always the latest, and the best by a validation metric."""

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    top_k: int = 1
    """How many of the best stay; -1 keeps every checkpoint."""

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
    """What ranking.json says."""

    retention: Retention = Retention()
    metrics: dict[int, dict[str, float | None]] = field(default_factory=dict)


def read_ranking(folder: Path) -> Ranking:
    """Reads the ranking of a checkpoints folder; empty if it is not there or damaged."""
    try:
        stored = json.loads((folder / RANKING).read_text())
        return Ranking(
            retention=Retention(monitor=stored["monitor"], mode=stored["mode"]),
            metrics={int(step): values for step, values in stored["metrics"].items()},
        )
    except FileNotFoundError:
        return Ranking()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("cannot read %s (%s); no checkpoint counts as best", folder / RANKING, error)
        return Ranking()


def write_ranking(folder: Path, ranking: Ranking) -> None:
    """Replaces the ranking of a checkpoints folder, in one step."""
    text = json.dumps(
        {
            "monitor": ranking.retention.monitor,
            "mode": ranking.retention.mode,
            "metrics": ranking.metrics,
        },
        indent=1,
    )
    draft = folder / f"{RANKING}.draft"
    draft.write_text(text)
    draft.replace(folder / RANKING)
