r"""Takes turns with two benchmarks, A B A B, and prints the ratio of every time that both print.

    python -m benchmarks.side_by_side "python -m benchmarks.salm --preset small --seconds 8" \\
        --against "python torch_peer.py --preset small --seconds 8" --rounds 4

Each command prints one line of JSON; keys that end in `_s` are seconds (a number, or
[median, fastest, slowest]) and are compared. A ratio above 1 means that the first is faster; its
spread is over the rounds. Both run on the same `--cores`, one after the other, never at once.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import timing

Result = Mapping[str, Any]
NOT_COMPARED = ("seconds", "train_audio_s_per_s")
"""Keys that are no time of a call."""
COUNTS = ("parameters_m", "trainable_m")


def main() -> None:
    """Runs both commands in turns; prints the table and one line of JSON."""
    arguments = _arguments()
    if arguments.cores:
        pin(arguments.cores)
    commands = {"ours": arguments.ours, "theirs": arguments.against}
    rounds: list[dict[str, Result]] = []
    for number in range(1, arguments.rounds + 1):
        results = {}
        for name, command in commands.items():
            timing.log(f"round {number} of {arguments.rounds}: {name} (load {_load()})")
            results[name] = run(shlex.split(command))
        rounds.append(results)
        timing.log(", ".join(f"{k} {v:.2f}x" for k, v in ratios(results).items()))
    counts = {key: [rounds[0][name].get(key) for name in commands] for key in COUNTS}
    for key, (ours, theirs) in counts.items():
        print(f"{key}: ours {ours}, theirs {theirs}{'' if ours == theirs else ' (THEY DIFFER)'}")
    summary = summarise(rounds)
    table = [{"what": key, **values} for key, values in summary.items()]
    timing.report(
        table,
        {"commands": commands, "counts": counts, "ratios": summary, "machine": timing.machine()},
    )


def run(command: Sequence[str]) -> Result:
    """Runs a command and reads its last line of JSON.

    Raises SystemExit with its error output if it fails or prints none.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1])


def pin(cores: Sequence[int]) -> None:
    """Lets this process, and all that it starts, run on these cores with a thread on each."""
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))


def ratios(results: Mapping[str, Result]) -> dict[str, float]:
    """Theirs over ours for every time that both have."""
    ours, theirs = results["ours"], results["theirs"]
    keys = [k for k in ours if k.endswith("_s") and k not in NOT_COMPARED and k in theirs]
    return {key: seconds(theirs[key]) / seconds(ours[key]) for key in keys}


def summarise(rounds: Sequence[Mapping[str, Result]]) -> dict[str, dict[str, float]]:
    """Per time: median seconds of both, and the ratio with its spread over the rounds.

    The ratio is the geometric mean of the rounds' own, so that a slow minute of the machine, which
    both sides of a round see, weighs little.
    """
    each = [ratios(results) for results in rounds]
    table = {}
    for key in each[0]:
        values = [one[key] for one in each]
        table[key] = {
            "ours, s": statistics.median(seconds(r["ours"][key]) for r in rounds),
            "theirs, s": statistics.median(seconds(r["theirs"][key]) for r in rounds),
            "ratio": math.exp(statistics.fmean(map(math.log, values))),
            "least": min(values),
            "most": max(values),
            "rounds": len(values),
        }
    return table


def seconds(value: Any) -> float:
    """The median of a [median, fastest, slowest], or the number itself."""
    return float(value[0] if isinstance(value, list) else value)


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("ours", help="a command that prints one line of JSON")
    parser.add_argument("--against", required=True, help="another one")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--cores",
        type=lambda text: [int(core) for core in text.split(",")],
        help="numbers of the cores that each may use, such as 0,1",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
