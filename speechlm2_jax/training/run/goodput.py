"""Where the wall time of a run went, and its goodput: the share in which it trained."""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from speechlm2_jax.training.protocol import DataSource, KeepsErrors
from speechlm2_jax.training.run.directory import METRICS
from speechlm2_jax.training.run.metrics_log import MetricsLog
from speechlm2_jax.training.run.run_state import RunProgress
from speechlm2_jax.training.run.throughput import COMPUTE, Throughput

log = logging.getLogger(__name__)


def process_age_s() -> float | None:
    """Seconds since the operating system started this process; None where it does not tell."""
    with suppress(OSError, IndexError, ValueError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s, 0.0)
    return None


def add_start(throughput: Throughput, importing_s: float | None, before_s: float) -> None:
    """Counts the time before `throughput` was made.

    With `importing_s`, the seconds from the start of the process to the end of its imports, all
    wall time of the process counts, else `before_s`, the seconds of `fit` so far.
    """
    age_s = None if importing_s is None else process_age_s()
    if importing_s is None or age_s is None:
        return throughput.add("starting", before_s)
    throughput.add("importing", importing_s)
    throughput.add("starting", max(age_s - importing_s, 0.0))


class TimeReport:
    """Writes, at the end of a process, the row and the line of where its time went."""

    def __init__(
        self,
        metrics_log: MetricsLog,
        throughput: Throughput,
        datamodule: DataSource,
        progress: RunProgress,
        run_dir: Path | None,
    ):
        self._metrics_log, self._throughput, self._data = metrics_log, throughput, datamodule
        self._progress, self._run_dir, self._first_step = progress, run_dir, progress.step

    def write(self) -> None:
        """Writes if a step was taken; also dropped conversations by cause."""
        if self._progress.step == self._first_step:
            return
        spent = self._throughput.totals()
        total_s = sum(spent.values())
        row = {f"time_{kind}_s": seconds for kind, seconds in spent.items()}
        goodput = spent[COMPUTE] / max(total_s, 1e-9)
        with suppress(OSError):  # a full disk has been reported
            self._metrics_log.write(
                {
                    "step": self._progress.step,
                    "time_total_s": total_s,
                    **row,
                    "goodput": goodput,
                    "time_ended": time.time(),
                }
            )
        shares = ", ".join(f"{kind.replace('_', ' ')} {s:.1f}" for kind, s in spent.items())
        log.info("time %.1f s: %s; goodput %.1f%%%s", total_s, shares, 100 * goodput, self._whole())
        for cause, count in self._data.dropped.items():
            log.info("dropped %d conversations: %s", count, cause)
        if isinstance(self._data, KeepsErrors) and (errors := self._data.errors_by_source()):
            log.info("what this process could not use:\n%s", errors)

    def _whole(self) -> str:
        """The end of the line for a run of several starts."""
        rows = time_rows(self._run_dir / METRICS) if self._run_dir is not None else []
        if len(rows) < 2:
            return ""
        total_s = sum(row["time_total_s"] for row in rows)
        computed_s = sum(row[f"time_{COMPUTE}_s"] for row in rows)
        share = 100 * computed_s / max(total_s, 1e-9)
        return f" (of {len(rows)} starts: {total_s:.1f} s, {share:.1f}%)"


def time_rows(path: Path) -> list[Mapping[str, float]]:
    """The rows of metrics.jsonl that tell where the time of a process went."""
    found: list[Mapping[str, float]] = []
    with suppress(OSError), path.open(encoding="utf-8") as lines:
        for line in lines:
            with suppress(ValueError):
                if '"time_total_s"' in line:
                    found.append(json.loads(line))
    return found
