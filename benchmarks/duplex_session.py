"""Times the frames of duplex sessions, minute by minute, for a model of a named shape.

    python -m benchmarks.duplex_session --preset small --minutes 10
    python -m benchmarks.duplex_session --preset small --minutes 1 --sessions 6
    python -m benchmarks.duplex_session --preset tinyllama --dtype bfloat16 --minutes 1

The audio is noise, the weights are random; frame times do not depend on either. Each row is one
minute of conversation: median and 95th percentile of the time from a chunk to its frames, the
bytes of the state and the memory of the process. With `--sessions` that many conversations share a
step, and the times are those of a step for all of them. The parts are written to `--parts` if they
are not there yet (benchmarks/duplex_parts.py). Needs the JAX stack only.
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
from speechlm2_jax.inference.sessions.conversation import DuplexFrame
from speechlm2_jax.inference.sessions.duplex_session import DuplexSession
from speechlm2_jax.inference.sessions.session_pool import DuplexSessionPool
from speechlm2_jax.models import DuplexS2SModel

WARMUP_S = 2.0


def main() -> None:
    """Runs the conversation and prints the table and the line of JSON."""
    arguments = _arguments()
    model, dtype = load(arguments)
    conversations = _conversations(model, arguments)
    rows = list(minutes(conversations, arguments.minutes, model.sampling_rate))
    kept = {name: value for name, value in vars(arguments).items() if name != "parts"}
    result = {**kept, "dtype": dtype, "minutes": rows, "machine": timing.machine()}
    timing.report(rows, result)


class Together:
    """Sessions of a pool that take the same samples."""

    def __init__(self, pool: DuplexSessionPool) -> None:
        self.chunk_s, self.state_bytes = pool.chunk_s, pool.state_bytes
        self._pool = pool
        self._sessions = [pool.join() for _ in range(pool.slots)]

    def push(self, samples: np.ndarray) -> Iterator[DuplexFrame]:
        """Gives the frames of the first session, step by step."""
        for session in self._sessions:
            session.feed(samples)
        while frames := self._pool.step():
            yield from frames[self._sessions[0]]


def _conversations(
    model: DuplexS2SModel, arguments: argparse.Namespace
) -> DuplexSession | Together:
    window_s = arguments.window_s
    if arguments.sessions is None:
        return model.session(session_window_s=window_s)
    no_limit = float("inf")
    pool = model.session_pool(arguments.sessions, max_load=no_limit, session_window_s=window_s)
    return Together(pool)


def minutes(
    session: DuplexSession | Together, count: int, rate_hz: int
) -> Iterator[dict[str, Any]]:
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
    parser.add_argument("--sessions", type=int, help="conversations that share a step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
