"""Loads a running server with clients, and measures what each of them waits for.

    speechlm2-jax serve runs/salm --port 8000
    python -m benchmarks.serve --clients 1 8 32
    python -m benchmarks.serve --clients 32 --requests 2000 --abort 0.05 --check runs/salm

Every client sends the recordings of a manifest one after another. Printed are seconds of audio per
second, latencies, the time to the first text, the longest wait between two texts of a stream, and
the processor time of this process. Only addresses of this machine are loaded.

`--check` is the model that the server has: every whole response must then be that of
`model.transcribe`, for recordings of mixed lengths; the server must be idle afterwards, without a
fault; and `--pid` must not have grown. The status is 1 if anything is wrong.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.serve_checks import Server, offline_texts
from benchmarks.serve_load import Load, Measured, mixed_lengths, read_manifest, send_all


def main() -> int:
    """Measures each number of clients, and prints a row for each. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--manifest", type=Path, default=Path("corpus/test.jsonl"))
    parser.add_argument("--requests", type=int, default=258)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--streams", type=float, default=0.0, help="share of streamed requests")
    parser.add_argument("--abort", type=float, default=0.0, help="share of requests that are left")
    parser.add_argument(
        "--check", default="", help="model of the server, to compare responses with"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="as the server has it")
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is measured")
    arguments = parser.parse_args()
    if urlsplit(arguments.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error(f"--url {arguments.url}: only this machine is loaded")
    own, server = arguments, Server(arguments.url, arguments.pid)
    recordings = read_manifest(own.manifest, own.requests)
    if own.check:
        recordings = mixed_lengths(recordings)
        recordings = offline_texts(own.check, recordings, own.max_new_tokens)
    load = Load(own.url, recordings, own.requests, own.streams, own.abort)
    asyncio.run(send_all(Load(own.url, recordings, 4, own.streams), 2))  # the first ones warm up
    print("clients  audio s/s  requests/s  p50 ms  p95 ms  first text p95  gap p50  gap max  CPU")
    is_wrong = False
    for clients in own.clients:
        seen = _round(load, clients, server)
        wrong = [*seen.wrong, *(server.problems() if own.check else [])]
        is_wrong |= bool(seen.failed or wrong)
        print("\n".join(wrong[:20]) if wrong else "", end="\n" if wrong else "", flush=True)
    return int(is_wrong)


def _round(load: Load, clients: int, server: Server) -> Measured:
    start_s, cpu_s = time.perf_counter(), time.process_time()
    seen = asyncio.run(send_all(load, clients, server.note_memory))
    taken_s, own_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    print(
        f"{clients:7}  {seen.audio_s / taken_s:9.1f}  {len(seen.latencies_s) / taken_s:10.2f}  "
        f"{_ms(seen.latencies_s, 50):6.0f}  {_ms(seen.latencies_s, 95):6.0f}  "
        f"{_ms(seen.first_texts_s, 95):14.0f}  {_ms(seen.gaps_s, 50):7.1f}  "
        f"{_ms(seen.gaps_s, 100):7.1f}  {own_s / taken_s:4.0%}  left {seen.left}"
    )
    for reason, count in seen.failures.most_common():
        print(f"         failed {count}: {reason}")
    return seen


def _ms(values: Sequence[float], percentile: float) -> float:
    return float(np.percentile(values, percentile)) * 1000 if values else float("nan")


if __name__ == "__main__":
    sys.exit(main())
