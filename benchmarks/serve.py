"""Loads a running server with clients, and measures what each of them waits for.

    speechlm2-jax serve runs/salm --port 8000
    python -m benchmarks.serve --clients 1 8 32

Every client sends the recordings of a manifest one after another. Printed are seconds of audio per
second, latencies, the time to the first token, the longest wait between two tokens of a stream, and
the processor time of this process. Only addresses of this machine are loaded.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

TIMEOUT_S = 300.0


@dataclass
class Measured:
    """What the clients of one round saw."""

    latencies_s: list[float] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between the events of streams."""
    audio_s: float = 0.0
    failed: int = 0


@dataclass(frozen=True)
class Recording:
    """A file and its length in seconds."""

    path: Path
    duration_s: float


def read_manifest(path: Path, count: int) -> list[Recording]:
    """The first `count` rows of a manifest."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [Recording(path.parent / row["audio_filepath"], row["duration"]) for row in rows]


async def one(client: httpx.AsyncClient, own: Recording, stream: bool, seen: Measured) -> None:
    """Sends one recording and reads the response."""
    start_s = time.perf_counter()
    data = {"stream": "true"} if stream else {}
    files = {"file": (own.path.name, own.path.read_bytes())}
    path = "/v1/audio/transcriptions"
    async with client.stream("POST", path, data=data, files=files) as reply:
        if reply.status_code != 200:
            seen.failed += 1
            return
        last_s: float | None = None
        async for line in reply.aiter_lines():
            if not line or not stream:
                continue
            now_s = time.perf_counter()
            if last_s is None:
                seen.first_tokens_s.append(now_s - start_s)
            else:
                seen.gaps_s.append(now_s - last_s)
            last_s = now_s
    seen.latencies_s.append(time.perf_counter() - start_s)
    seen.audio_s += own.duration_s


async def load(url: str, recordings: Sequence[Recording], clients: int, streams: float) -> Measured:
    """Sends all recordings once, over `clients` connections; a share of them as streams."""
    seen, todo = Measured(), iter(list(enumerate(recordings)))
    limits = httpx.Limits(max_connections=clients)

    async def work(client: httpx.AsyncClient, todo: Iterator[tuple[int, Recording]]) -> None:
        for number, own in todo:
            is_stream = int(number * streams) != int((number + 1) * streams)
            await one(client, own, is_stream, seen)

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        await asyncio.gather(*(work(client, todo) for _ in range(clients)))
    return seen


def main() -> None:
    """Measures each number of clients, and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--manifest", type=Path, default=Path("corpus/test.jsonl"))
    parser.add_argument("--requests", type=int, default=258)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--streams", type=float, default=0.0, help="share of streamed requests")
    arguments = parser.parse_args()
    if urlsplit(arguments.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error(f"--url {arguments.url}: only this machine is loaded")
    recordings = read_manifest(arguments.manifest, arguments.requests)
    some = list(itertools.islice(itertools.cycle(recordings), arguments.requests))
    asyncio.run(load(arguments.url, some[:4], 2, arguments.streams))  # the first ones warm up
    print("clients  audio s/s  requests/s  p50 ms  p95 ms  first token p95  gap p50  gap max  CPU")
    for clients in arguments.clients:
        start_s, cpu_s = time.perf_counter(), time.process_time()
        seen = asyncio.run(load(arguments.url, some, clients, arguments.streams))
        taken_s, own_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        print(
            f"{clients:7}  {seen.audio_s / taken_s:9.1f}  {len(seen.latencies_s) / taken_s:10.2f}  "
            f"{_ms(seen.latencies_s, 50):6.0f}  {_ms(seen.latencies_s, 95):6.0f}  "
            f"{_ms(seen.first_tokens_s, 95):15.0f}  {_ms(seen.gaps_s, 50):7.1f}  "
            f"{_ms(seen.gaps_s, 100):7.1f}  {own_s / taken_s:4.0%}  failed {seen.failed}"
        )


def _ms(values: Sequence[float], percentile: float) -> float:
    return float(np.percentile(values, percentile)) * 1000 if values else float("nan")


if __name__ == "__main__":
    main()
