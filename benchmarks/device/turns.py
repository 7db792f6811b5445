"""This package and a PyTorch peer take turns on the same training step and generation: A B A B.

Both stay loaded, each in a process of its own that runs commands (`train 3`: three steps), so
that nothing is compiled twice and one of them works at a time. Only their first calls, which
compile, run side by side. The peer is `benchmarks/peers/torch_peer.py`, run by the interpreter
that PEER_PYTHON names, or by the one that runs this.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import side_by_side, timing
from benchmarks.device.plan import FULL, TINY, Plan, peer_gib, training_gib
from benchmarks.device.rows import Row, Rows
from benchmarks.device.salm import (
    compute_dtype,
    generation_work,
    training_rates,
    training_work,
)
from benchmarks.salm_work import Work

PEER = Path(__file__).parents[1] / "peers" / "torch_peer.py"
PEER_PYTHON = "PEER_PYTHON"
HAS_PEER = """
from importlib.util import find_spec
missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
raise SystemExit(" and ".join(missing) + " not installed" if missing else 0)
"""
OURS_SHARE, THEIRS_SHARE = 0.45, 0.50
"""Of the device's memory, that each may take while both are loaded."""
OURS = "speechlm2_jax"
SIDES = {OURS: "", "PyTorch": "", "PyTorch, torch.compile": "-compiled"}
"""What takes turns, with the ending of its commands."""


class Worker:
    """A process that replies to each line with a line of JSON."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, line: str) -> None:
        """Gives a command; raises OSError if the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def receive(self, timeout_s: float) -> Row:
        """Waits for the next line of JSON.

        Raises TimeoutError if none comes in time, RuntimeError if the process ends or reports an
        error.
        """
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                raise TimeoutError(f"no result within {timeout_s:.0f} s") from None
            if line is None:
                raise RuntimeError(f"the process ended with code {self._process.wait()}")
            if line.startswith("{"):
                break
        result = json.loads(line)
        if "error" in result:
            raise RuntimeError(result["error"])
        return result

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)


def compare(plan: Plan, rows: Rows) -> None:
    """Training steps and generation in turns; skipped where the peer cannot run."""
    reason = peer_is_missing()
    batch = None if reason else common_batch(plan, rows)
    if reason or batch is None:
        reason = reason or "no batch is small enough for both to be loaded at once"
        rows.put("PyTorch", "skipped", reason=reason)
        return
    seconds = plan.trainings["training-15s"].seconds
    work = training_work(plan, seconds, batch, plan.trainings["training-15s"].remat)
    tiny = ["--tiny"] if plan.is_tiny else []
    command = [sys.executable, "-m", "benchmarks.device.turns", "--batch", str(batch), *tiny]
    memory = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(OURS_SHARE),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    }
    workers: dict[str, Worker] = {}
    try:
        workers[OURS] = Worker(command, memory)
        workers["PyTorch"] = Worker(peer_command(plan, batch, seconds))
        peer = workers["PyTorch"].receive(rows.left_s)
        note = f"torch {peer['torch']}, {peer['parameters_m']} M parameters"
        workers[OURS].receive(rows.left_s)
        trained = f"training step, {batch} x {seconds:g} s"
        take_turns(plan, rows, workers, "train", trained, lambda s: training_rates(work, s), note)
        tokens = batch * plan.new_tokens
        generated = f"generation, {batch} x {seconds:g} s, {plan.new_tokens} tokens"
        rates = lambda s: {"rate": tokens / s, "rate_unit": "tokens/s"}  # noqa: E731
        take_turns(plan, rows, workers, "generate", generated, rates, note)
    except (TimeoutError, RuntimeError, OSError) as error:
        rows.put("PyTorch", "failed", reason=str(error))
    finally:
        for worker in workers.values():
            worker.close()


def peer_is_missing() -> str | None:
    """Why the peer cannot run; None if it can."""
    if jax.default_backend() not in ("cpu", "gpu"):
        return f"the peer does not run on {jax.default_backend()}"
    python = os.environ.get(PEER_PYTHON, sys.executable)
    done = subprocess.run([python, "-c", HAS_PEER], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    message = done.stderr.strip().splitlines()[-1:] or ["it ended without a message"]
    return f"{message[0]} ({python}; {PEER_PYTHON} names another interpreter)"


def common_batch(plan: Plan, rows: Rows) -> int | None:
    """The largest batch with which both fit side by side."""
    job = plan.trainings["training-15s"]
    for batch in job.batches:
        work = training_work(plan, job.seconds, batch, job.remat)
        itemsize = 4 if compute_dtype() == "float32" else 2
        needed = training_gib(work, job.remat) / OURS_SHARE, peer_gib(work, itemsize) / THEIRS_SHARE
        if rows.fits(max(needed)):
            return batch
    return None


def peer_command(plan: Plan, batch: int, seconds: float) -> list[str]:
    """The peer on the same work."""
    options = {
        "preset": plan.preset,
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
        "dtype": compute_dtype(),
        "batch": batch,
        "seconds": seconds,
        "prompt": plan.prompt,
        "answer": plan.target,
        "new-tokens": plan.new_tokens,
        "backend": plan.peer_backend,
        "memory-fraction": THEIRS_SHARE,
    }
    python = os.environ.get(PEER_PYTHON, sys.executable)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [python, str(PEER), *words, "--serve"]


def take_turns(
    plan: Plan,
    rows: Rows,
    workers: Mapping[str, Worker],
    kind: str,
    what: str,
    rates: Callable[[float], Row],
    note: str,
) -> None:
    """Prints a row for each side; a peer that fails leaves the other rows."""
    firsts, failures = first_calls(rows, workers, kind)
    sides = [side for side in SIDES if side in firsts]
    repeats = max(1, plan.repeats // 2)
    rounds: list[dict[str, list[float]]] = []
    for _ in range(plan.rounds):
        timing.log(f"pytorch: {what}: round {len(rounds) + 1} of {plan.rounds} ...")
        rounds.append({side: ask(rows, workers, kind, side, repeats)["times_s"] for side in sides})
    for side in sides:
        times = [second for each in rounds for second in each[side]]
        median = statistics.median(times)
        compared = {} if side == OURS else ratio(rounds, side)
        rows.put(
            f"{what}: {side}",
            "measured",
            time_s=[median, min(times), max(times)],
            first_call_s=firsts[side]["first_call_s"],
            compile_s=max(firsts[side]["first_call_s"] - median, 0.0),
            peak_memory_gib=firsts[side].get("peak_memory_gib"),
            **{"note": "" if side == OURS else note, **compared},
            **rates(median),
        )
    for side, failure in failures.items():
        rows.put(f"{what}: {side}", "failed", reason=failure)


def first_calls(
    rows: Rows, workers: Mapping[str, Worker], kind: str
) -> tuple[dict[str, Row], dict[str, str]]:
    """The first call of each side, and why some failed. Raises if this package's own fails."""
    timing.log(f"pytorch: first calls of {kind} ...")
    workers[OURS].send(f"{kind} 0")
    firsts, failures = {}, {}
    for side in list(SIDES)[1:]:
        try:
            firsts[side] = ask(rows, workers, kind, side, 0)
        except RuntimeError as error:
            failures[side] = str(error)
    return {OURS: workers[OURS].receive(rows.left_s), **firsts}, failures


def ask(rows: Rows, workers: Mapping[str, Worker], kind: str, side: str, repeats: int) -> Row:
    """One turn of one side."""
    worker = workers[OURS if side == OURS else "PyTorch"]
    worker.send(f"{kind}{SIDES[side]} {repeats}")
    return worker.receive(rows.left_s)


def ratio(rounds: Sequence[Mapping[str, list[float]]], side: str) -> Row:
    """The side's seconds over this package's: geometric mean of the rounds, least and most."""
    times = [{"ours": {"call_s": r[OURS]}, "theirs": {"call_s": r[side]}} for r in rounds]
    median = {"call_s": statistics.median}
    medians = [
        {
            name: {key: median[key](value) for key, value in each.items()}
            for name, each in one.items()
        }
        for one in times
    ]
    summary = side_by_side.summarise(medians)["call_s"]
    text = f"{summary['ratio']:.2f} x our time ({summary['least']:.2f} to {summary['most']:.2f})"
    return {**{k: summary[k] for k in ("ratio", "least", "most", "rounds")}, "note": text}


def serve(plan: Plan, batch: int) -> None:
    """Prints the seconds of N calls for each command `train N` or `generate N`, like the peer."""
    job = plan.trainings["training-15s"]
    makes: dict[str, Callable[[], Callable[[], Any]]] = {
        "train": lambda: training_work(plan, job.seconds, batch, job.remat).training(),
        "generate": lambda: _generating(plan, batch),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name, repeats = line.split()
        result: Row = {}
        try:
            if name not in calls:
                calls.clear()  # the weights of the call before are free for this one
                calls[name] = makes[name]()
                result["first_call_s"], _ = timing.timed(calls[name])
            result["times_s"] = [timing.timed(calls[name])[0] for _ in range(int(repeats))]
            result["peak_memory_gib"] = timing.peak_device_memory_gib()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


def _generating(plan: Plan, batch: int) -> Callable[[], Any]:
    work: Work = generation_work(plan, batch)
    return work.generation()


def main() -> None:
    """Serves this package's side."""
    parser = timing.parser(__doc__)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps({"jax": jax.__version__}), flush=True)
    serve(TINY if arguments.tiny else FULL, arguments.batch)


if __name__ == "__main__":
    main()
