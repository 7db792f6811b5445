"""Times the replies of a server of conversations on this machine, with a client in real time.

    python -m benchmarks.talk --preset tiny --seconds 30
    python -m benchmarks.talk --preset tiny --seconds 30 --clients 3 --protocol moshi

A client sends noise in packets of 20 ms in real time. A reply is the time from the moment when the
last packet of a chunk is sent to the arrival of the agent's samples for it, so both ways through
the machine's sockets are in it. `wait` and `compute` are the server's own figures of the Realtime
protocol. The weights are random; the parts are written to `--parts` if they are not there yet.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from benchmarks import duplex_parts, timing
from benchmarks.duplex import load
from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.opus import OpusWriter
from speechlm2_jax.serving.duplex.realtime_events import pcm_base64
from speechlm2_jax.serving.duplex.server import server_config
from speechlm2_jax.serving.duplex.service import ConversationService
from speechlm2_jax.serving.duplex.sessions import PoolSessions
from speechlm2_jax.serving.server import DrainingServer

RATE_HZ = 24_000
PACKET = RATE_HZ // 50


def main() -> None:
    """Runs server and clients and prints the table and the line of JSON."""
    arguments = _arguments()
    model, dtype = load(arguments)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = ConversationOptions(
        model="model", port=port, max_sessions=arguments.clients, max_load=1e9
    )
    sessions = PoolSessions(model, options)
    service = ConversationService(options, lambda own: sessions)
    server = DrainingServer(server_config(service, port), service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while service.why_unready is not None or not server.started:
        time.sleep(0.05)
    found = asyncio.run(_clients(arguments, port, sessions.facts.chunk_s))
    server.should_exit = True
    thread.join(20)
    rows = [_row(name, values) for name, values in found.items() if values]
    kept = {name: value for name, value in vars(arguments).items() if name != "parts"}
    timing.report(rows, {**kept, "dtype": dtype, "rows": rows, "machine": timing.machine()})


def _row(name: str, values: list[float]) -> dict[str, Any]:
    middle, high = np.percentile(values, [50, 95])
    return {"time": name, "p50 ms": float(middle), "p95 ms": float(high), "chunks": len(values)}


async def _clients(
    arguments: argparse.Namespace, port: int, chunk_s: float
) -> dict[str, list[float]]:
    run = _realtime if arguments.protocol == "realtime" else _moshi
    found: dict[str, list[float]] = {"reply": [], "wait": [], "compute": []}
    work = [run(port, arguments.seconds, chunk_s, found) for _ in range(arguments.clients)]
    await asyncio.gather(*work)
    return found


async def _realtime(
    port: int, seconds: float, chunk_s: float, found: dict[str, list[float]]
) -> None:
    sent_s: list[float] = []

    def message(packet: np.ndarray) -> str:
        return json.dumps({"type": "input_audio_buffer.append", "audio": pcm_base64(packet)})

    async with connect(f"ws://127.0.0.1:{port}/v1/realtime?frames=true") as own:
        sender = asyncio.create_task(_send(own, seconds, message, sent_s))
        while not sender.done() or not sent_s:
            event = json.loads(await own.recv())
            if event["type"] != "speechlm2.frames":
                continue
            last = _packet_of(event["end_s"])
            if last < len(sent_s):
                found["reply"].append(1e3 * (time.perf_counter() - sent_s[last]))
                found["wait"].append(event["queue_ms"])
                found["compute"].append(event["compute_ms"])


async def _moshi(port: int, seconds: float, chunk_s: float, found: dict[str, list[float]]) -> None:
    sent_s: list[float] = []
    writer, chunks = OpusWriter(), 0
    async with connect(f"ws://127.0.0.1:{port}/api/chat") as own:
        encode = lambda packet: b"\x01" + writer.push(packet)  # noqa: E731
        sender = asyncio.create_task(_send(own, seconds, encode, sent_s))
        while not sender.done() or not sent_s:
            received = await own.recv()
            if received[0] != 1:
                continue
            chunks += 1
            last = _packet_of(chunks * chunk_s)
            if last < len(sent_s):
                found["reply"].append(1e3 * (time.perf_counter() - sent_s[last]))


def _packet_of(end_s: float) -> int:
    """The last packet of a chunk that ends at a time."""
    return round(end_s * RATE_HZ) // PACKET - 1


async def _send(own: ClientConnection, seconds: float, encode: Any, sent_s: list[float]) -> None:
    noise = np.random.default_rng(0).normal(scale=0.05, size=RATE_HZ).astype(np.float32)
    begun_s = time.perf_counter()
    for number in range(round(seconds * 50)):
        start = number % 50 * PACKET
        await asyncio.sleep(max(0.0, begun_s + number * 0.02 - time.perf_counter()))
        await own.send(encode(noise[start : start + PACKET]))
        sent_s.append(time.perf_counter())


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--preset", choices=duplex_parts.PRESETS, default="tiny")
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--protocol", choices=("realtime", "moshi"), default="realtime")
    return parser.parse_args()


if __name__ == "__main__":
    main()
