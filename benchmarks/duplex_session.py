"""Times the frames of a duplex session, minute by minute, for a model of a named shape.

    python -m benchmarks.duplex_session --preset small --minutes 10
    python -m benchmarks.duplex_session --preset tinyllama --dtype bfloat16 --minutes 1

The audio is noise, the weights are random; frame times do not depend on either. Each row is one
minute of conversation: median and 95th percentile of the time from a chunk to its frames, the
bytes of the state and the memory of the process. The parts are written to `--parts` if they are not
there yet (benchmarks/duplex_parts.py). Needs the JAX stack only.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import duplex_parts, timing
from benchmarks.duplex import load
from speechlm2_jax.inference.sessions.duplex_session import DuplexSession

WARMUP_S = 2.0


def main() -> None:
    """Runs the conversation and prints the table and the line of JSON."""
    arguments = _arguments()
    model, dtype = load(arguments)
    session = model.session(session_window_s=arguments.window_s)
    rows = list(minutes(session, arguments.minutes, model.sampling_rate))
    kept = {name: value for name, value in vars(arguments).items() if name != "parts"}
    result = {**kept, "dtype": dtype, "minutes": rows, "machine": timing.machine()}
    timing.report(rows, result)


def minutes(session: DuplexSession, count: int, rate_hz: int) -> Iterator[dict[str, Any]]:
    """Times so many minutes of noise; the first frames, which compile, are left out."""
    noise = np.random.default_rng(0).normal(scale=0.05, size=60 * rate_hz).astype(np.float32)
    list(session.push(noise[: round(WARMUP_S * rate_hz)]))
    for minute in range(1, count + 1):
        seconds = [frame.compute_s for frame in session.push(noise)]
        middle, high = np.percentile(seconds, [50, 95])
        yield {
            "minute": minute,
            "median ms": 1e3 * float(middle),
            "p95 ms": 1e3 * float(high),
            "chunk ms": 1e3 * session.chunk_s,
            "state MB": session.state_bytes / 1e6,
            "peak GiB": timing.peak_host_memory_gib(),
        }
        timing.log(f"minute {minute} of {count}: median {1e3 * middle:.2f} ms per chunk")


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--preset", choices=duplex_parts.PRESETS, default="small")
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--window-s", type=float, default=120.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
