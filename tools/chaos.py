r"""Disturbs a training run of several processes at random moments, and compares how it ends.

    python -m tools.chaos FOLDER --rounds 30 -- \
        train.py --config salm exp_manager.explicit_log_dir={run}

In each round the run is started, and once it is killed (one process, or all), stopped by SIGTERM,
stalled (SIGSTOP of one process), or its disk is full (no process can write any more to a file). It
must end by itself within --limit seconds. Then the same command starts it again. A last start is
left alone. Its metrics.jsonl must hold the numbers of a run that was never disturbed, bit for bit:
every step once, in order. A run that ends before the last round is compared, and another begins.
All runs are in FOLDER; FOLDER/rounds.log has the output of each start. Exit code 0: they are the
same. Linux alone.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("kill", "kill all", "stall", "full disk", "stop")
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "acc", "skipped")
"""Fields of a row of metrics.jsonl that have no time in them; those of validation beside."""
POLL_S = 0.02
STARTING_S = 12.0
"""A third of the disturbances come so soon after the start, often before the first step."""
MOST_STEPS = 4
"""The others come after up to so many steps of a start, and up to a second later."""
MOST_BYTES = 100_000
"""A full disk lets each file grow to a random number of bytes, up to this one."""


def rows(run: Path) -> list[dict[str, Any]]:
    """The numbers of steps and validations in metrics.jsonl of a run, without times."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [_parsed(line) for line in lines]
    return [
        {k: v for k, v in row.items() if k in COMPARED or k.startswith("val_")}
        for row in found
        if "loss" in row or "val_loss" in row
    ]


def difference(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str | None:
    """The first difference of the rows of two runs, as one line; None if there is none."""
    for n, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return f"row {n}: {first} and {second}"
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} rows"
    return None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that can be started again and again."""

    folder: Path
    command: Sequence[str]
    """What the launcher starts; {run} is the folder."""
    processes: int
    heartbeat_s: int
    limit_s: float
    log: Path

    def start(self) -> "Started":
        """Starts all processes."""
        own = [word.replace("{run}", str(self.folder)) for word in self.command]
        launcher = ["-m", "speechlm2_jax.launch", "-n", str(self.processes)]
        heartbeat = ["--heartbeat", str(self.heartbeat_s)]
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *launcher, *heartbeat, *own], stdout=log, stderr=log
            )
        return Started(run=self, launcher=process)

    def last_step(self) -> int | None:
        """The step of the newest row."""
        found = rows(self.folder)
        return found[-1]["step"] if found else None


@dataclass(frozen=True, kw_only=True)
class Started:
    """One start of a run."""

    run: Run
    launcher: "subprocess.Popen[bytes]"

    def pids(self) -> list[int]:
        """The processes of the run, without those that ended, in the order of their start."""
        path = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        try:
            return sorted(map(int, path.read_text().split()))
        except FileNotFoundError:
            return []

    def wait_for(self, moment: Callable[[], bool]) -> bool:
        """Waits for a moment; False if the run ended, or did not come to it in time."""
        deadline = time.monotonic() + self.run.limit_s
        while time.monotonic() < deadline:
            if self.launcher.poll() is not None:
                return False
            if moment():
                return True
            time.sleep(POLL_S)
        return False

    def end(self, limit_s: float | None = None) -> int:
        """The exit code, 128 + N for signal N. Raises RuntimeError if the run does not end."""
        try:
            code = self.launcher.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the run did not end within {limit_s:.0f} s") from error
        finally:
            self.kill()
        return 128 - code if code < 0 else code

    def kill(self) -> None:
        """Kills what is left of the run."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGSTOP)  # so that it starts no more of them
            for pid in self.pids():
                _send(pid, signal.SIGKILL)
            self.launcher.kill()
        self.launcher.wait()


def disturb(started: Started, kind: str, draw: random.Random) -> str:
    """Disturbs a run. Returns a line about it."""
    pids = started.pids()
    index = draw.randrange(len(pids)) if pids else 0
    if kind == "kill all" or not pids:
        started.kill()
        return "SIGKILL to all processes"
    if kind == "stop":
        started.launcher.send_signal(signal.SIGTERM)
        return "SIGTERM"
    if kind == "full disk":
        most = draw.choice((0, draw.randrange(MOST_BYTES)))
        for pid in pids:
            _limit_files(pid, most)
        return f"a disk that takes files of {most} bytes"
    number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
    _send(pids[index], number)
    return f"{number.name} to process {index}"


def one_round(run: Run, kind: str, draw: random.Random) -> str | None:
    """Starts the run and disturbs it; what happened, or None if the run is finished."""
    started = run.start()
    try:
        # a stalled start is ended by JAX's own time limit of minutes, so that one waits for a step
        moment = _steps(run, draw) if kind == "stall" or draw.random() > 1 / 3 else _seconds(draw)
        if not started.wait_for(moment):
            code = started.end(run.limit_s)
            return None if code == 0 else f"ended with {code} before it was disturbed"
        time.sleep(draw.random() if kind != "stall" else 0)
        what, begin = disturb(started, kind, draw), time.monotonic()
        code = started.end(run.limit_s)
        took_s = time.monotonic() - begin
        return f"{what} after step {run.last_step()}: exit code {code} after {took_s:.1f} s"
    finally:
        started.kill()


def main(argv: Sequence[str]) -> int:
    """Runs all rounds; returns the exit code."""
    options = _options(argv)
    shared = {
        "command": options.command,
        "processes": options.processes,
        "heartbeat_s": options.heartbeat,
        "limit_s": options.limit,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "rounds.log"
    alone = Run(folder=options.folder / "undisturbed", log=log, **shared)
    disturbed = Run(folder=options.folder / "disturbed", log=log, **shared)
    if (code := alone.start().end()) != 0:
        print(f"the undisturbed run ended with {code}; see {log}")
        return 1
    draw = random.Random(options.seed)
    kinds = [KINDS[n % len(KINDS)] for n in range(options.rounds)]
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        while (what := one_round(disturbed, kind, draw)) is None:
            if not is_same(alone, disturbed):
                return 1
            disturbed.folder.rename(options.folder / f"finished_{number}")
        print(f"round {number + 1} of {options.rounds}: {what}", flush=True)
    if (code := disturbed.start().end()) != 0:
        print(f"the last start ended with {code}; see {log}")
    return int(code != 0 or not is_same(alone, disturbed))


def is_same(alone: Run, disturbed: Run) -> bool:
    """Whether two finished runs have the same numbers; prints it."""
    found = difference(rows(alone.folder), rows(disturbed.folder))
    count = len(rows(disturbed.folder))
    print(f"{count} rows are those of an undisturbed run" if found is None else f"differ: {found}")
    return found is None


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", "--processes", type=int, default=4)
    parser.add_argument("--heartbeat", type=int, default=60, help="seconds, as of the launcher")
    parser.add_argument("--limit", type=float, default=240, help="seconds to each end")
    at = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:at])
    options.command = argv[at + 1 :]
    if not options.command:
        parser.error("name the training after --: -- train.py --config NAME ...")
    return options


def _steps(run: Run, draw: random.Random) -> Callable[[], bool]:
    """The moment after a number of new rows."""
    left, seen = draw.randint(1, MOST_STEPS), [run.last_step()]

    def is_now() -> bool:
        if (step := run.last_step()) != seen[-1]:
            seen.append(step)
        return len(seen) > left

    return is_now


def _seconds(draw: random.Random) -> Callable[[], bool]:
    """The moment a number of seconds after now."""
    at = time.monotonic() + draw.uniform(0, STARTING_S)
    return lambda: time.monotonic() >= at


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _limit_files(pid: int, most_bytes: int) -> None:
    """Lets every write of a process to a file fail beyond a number of bytes (EFBIG)."""
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most_bytes, hard))


def _parsed(line: str) -> dict[str, Any]:
    """A row; empty for one that is being written."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
