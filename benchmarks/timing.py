"""What every benchmark shares: timing, memory, what machine it is, a table and a line of JSON."""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of `repeats`."""

    median_s: float
    fastest_s: float
    slowest_s: float
    processor_s: float
    """Median of the processor time, all threads together: what other programs do not lengthen."""
    repeats: int

    def as_list(self) -> list[float]:
        """[median, fastest, slowest], as the peers print it."""
        return [self.median_s, self.fastest_s, self.slowest_s]

    def __str__(self) -> str:
        return f"{_ms(self.median_s)} ({_ms(self.fastest_s)} to {_ms(self.slowest_s)})"


def measure(call: Callable[[], Any], *, repeats: int = 5, warmup: int = 1) -> Timing:
    """Times `call`, which must wait for its own result (`jax.block_until_ready`)."""
    for _ in range(warmup):
        call()
    seconds, processor = [], []
    for _ in range(repeats):
        start = time.process_time()
        seconds.append(timed(call)[0])
        processor.append(time.process_time() - start)
    return Timing(
        median_s=statistics.median(seconds),
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        processor_s=statistics.median(processor),
        repeats=repeats,
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that one call took, and what it gave."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def peak_host_memory_gib() -> float:
    """The most memory that this process has held at once."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / (2**30 if sys.platform == "darwin" else 2**20)


def peak_device_memory_gib() -> float | None:
    """The most that the first device has held at once; None where that is not known (CPUs)."""
    import jax

    statistics_of_it = jax.devices()[0].memory_stats() or {}
    used = statistics_of_it.get("peak_bytes_in_use")
    return None if used is None else used / 2**30


def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores in use, load, devices, versions."""
    import jax

    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": [round(x, 2) for x in os.getloadavg()],
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "large_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table whose columns are the keys of the first row."""
    rows = list(rows)
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def report(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Prints the table, then all of it as one line of JSON, which is the last line."""
    print(markdown(rows))
    print(json.dumps(result), flush=True)


def log(line: str) -> None:
    """Prints progress to standard error; standard output holds results only."""
    print(line, file=sys.stderr, flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.4g} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
