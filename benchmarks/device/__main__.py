"""Measures the model half on one accelerator within 9 minutes: a table, and a JSON file.

    benchmarks/device.sh              one GPU or TPU, canary-qwen-2.5b's shape and a duplex of 1.1B
    benchmarks/device.sh --tiny       all of it on a CPU with tiny models: a test, no measurement

Each part is a process of its own with a time budget: one that fails or runs out of memory leaves
the results of the others. A part that does not fit into the device's memory is skipped with the
reason. The results are in `--output`, by default `$OUT/device_results.json` or
`./device_results.json`, written after every part; the log of all parts is beside it.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.device.plan import PARTS, Part, deadlines
from benchmarks.device.rows import Row, table

MACHINE_S, EXIT_S = 60.0, 10.0
"""Seconds that the first look at the device, and the end of a finished process, may take."""
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
"""Of `--tiny`, whose times mean nothing."""
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
"""One part at a time has the device, so it may take nearly all of its memory."""


def main() -> int:
    """Runs the parts; gives the exit code."""
    arguments = _arguments()
    started = time.monotonic()
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    log_path = output.with_suffix(".log")
    with tempfile.TemporaryDirectory() as cache, log_path.open("w") as log:
        run = Run(arguments.tiny, environment(Path(cache), arguments.tiny), log)
        machine = run.machine()
        if machine["machine"]["platform"] == "cpu" and not arguments.tiny:
            timing.log("no accelerator was found; --tiny measures on a CPU")
            return 2
        timing.log(f"{machine['machine']['devices']}, {_versions(machine)}; log: {log_path}")
        result: dict[str, Any] = {**machine, "tiny": arguments.tiny, "parts": {}, "rows": []}
        chosen = [p for p in deadlines(PARTS) if p[0].name in (arguments.only or p[0].name)]
        # tiny parts, whose times mean nothing, run two at a time
        with ThreadPoolExecutor(2 if arguments.tiny else 1) as pool:
            measure = partial(run.before, started)
            for part, (rows, seconds) in pool.map(lambda p: (p[0], measure(*p)), chosen):
                result["parts"][part.name] = {"budget_s": part.budget_s, "seconds": seconds}
                result["rows"] += rows
                result["total_s"] = time.monotonic() - started
                output.write_text(json.dumps(result, indent=1))
    print(table(result["rows"]))
    print(f"{result['total_s']:.0f} s in all; results: {output}")
    return 0


class Run:
    """Starts the parts' processes and collects their rows."""

    def __init__(self, tiny: bool, environment: dict[str, str], log: Any):
        self._tiny, self._environment, self._log = tiny, environment, log

    def machine(self) -> Row:
        """The device and versions. Raises SystemExit if JAX finds no device."""
        rows, _ = self.part("machine", MACHINE_S)
        if rows[0]["status"] != "measured":
            raise SystemExit(f"no device: {rows[0]['reason']}; see {self._log.name}")
        return {key: rows[0][key] for key in ("machine", "memory_gib")}

    def before(self, started: float, part: Part, until_s: float) -> tuple[list[Row], float]:
        """A part that is stopped so many seconds after `started` (`time.monotonic`)."""
        return self.part(part.name, started + until_s - time.monotonic())

    def part(self, name: str, left_s: float) -> tuple[list[Row], float]:
        """Rows of one part, the last of which tells what went wrong, and the seconds it took."""
        started = time.monotonic()
        process = subprocess.Popen(
            self._command(name, left_s),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**self._environment, **_memory(name)},
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        rows: list[Row] = []
        reason = None
        while True:
            try:
                line = lines.get(timeout=max(started + left_s - time.monotonic(), 0.01))
            except queue.Empty:
                reason = f"stopped after its {left_s:.0f} s"
                break
            if line is None:
                break
            if line.startswith("{"):
                rows.append(json.loads(line))
                timing.log(_line(rows[-1]))
        _end(process, EXIT_S if reason is None else 0.0)
        reader.join()
        if reason is None and process.returncode:
            reason = f"the process ended with code {process.returncode}"
        if reason is not None or not rows:
            reason = reason or "the process printed no result"
            row = {"part": name, "what": "-", "status": "failed", "reason": reason}
            timing.log(_line(row))
            rows.append(row)
        return rows, time.monotonic() - started

    def _command(self, name: str, left_s: float) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.device.parts", name]
        command += ["--seconds", f"{left_s - 1:.1f}"]
        return [*command, "--tiny"] if self._tiny else command


def environment(cache: Path, tiny: bool) -> dict[str, str]:
    """Variables of every part: this repository, and one cache of compiled programs for all.

    The comparison with the peer finds there what the parts before it have compiled.
    """
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if tiny:
        flags = os.environ.get("XLA_FLAGS", "")
        added |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {QUICK_TO_COMPILE}"}
    return {**os.environ, **added}


def _memory(name: str) -> dict[str, str]:
    """What a part may take of a GPU's memory; the comparison leaves it to its two sides."""
    alone = name in ("machine", "pytorch")
    return {**MEMORY, "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if alone else "true"}


def _read(stream: Any, lines: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _end(process: "subprocess.Popen[str]", grace_s: float) -> None:
    """Waits so long for a process, then ends it and all that it has started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _line(row: Row) -> str:
    seconds = row.get("time_s")
    told = row.get("reason", "") if seconds is None else f"{1e3 * seconds[0]:,.4g} ms"
    return f"  {row['part']}: {row['what']}: {row['status']} {told}"


def _versions(machine: Row) -> str:
    return ", ".join(f"{k} {machine['machine'][k]}" for k in ("python", *timing.PACKAGES))


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    default = Path(os.environ.get("OUT") or ".") / "device_results.json"
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in less than a minute")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--output", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
