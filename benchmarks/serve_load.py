"""The requests of `benchmarks.serve`: sent by clients at once, some streamed, some left early."""

import asyncio
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile

from speechlm2_jax.data.audio import read_audio

TIMEOUT_S = 300.0
PATH = "/v1/audio/transcriptions"
RATE_HZ = 16000
JOINED = (1, 1, 2, 1, 8)
"""How many recordings make one, in turn, where lengths are mixed."""


@dataclass(frozen=True)
class Recording:
    """An upload and its length in seconds."""

    name: str
    data: bytes
    duration_s: float
    text: str | None = None
    """The response that it must have."""


@dataclass
class Measured:
    """What the clients of one round saw."""

    latencies_s: list[float] = field(default_factory=list)
    first_texts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between the texts of streams."""
    audio_s: float = 0.0
    left: int = 0
    """Requests that were left before their response was there."""
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Responses that are not those they must be."""

    @property
    def failed(self) -> int:
        """Requests without a whole response, but for those that were left."""
        return self.failures.total()


@dataclass(frozen=True)
class Load:
    """Some requests."""

    url: str
    recordings: Sequence[Recording]
    """Sent in turn."""
    requests: int
    streams: float = 0.0
    """Share of streamed requests."""
    aborted: float = 0.0
    """Share of requests whose client leaves."""


class FailedError(Exception):
    """A request without a whole response, and why."""


def read_manifest(path: Path, count: int) -> list[Recording]:
    """The first `count` rows of a manifest."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    files = [path.parent / row["audio_filepath"] for row in rows]
    return [
        Recording(file.name, file.read_bytes(), row["duration"])
        for file, row in zip(files, rows, strict=True)
    ]


def mixed_lengths(recordings: Sequence[Recording]) -> list[Recording]:
    """Recordings of which some are several, one after another with pauses between them."""
    found, rest = [], list(recordings)
    while rest:
        count = JOINED[len(found) % len(JOINED)]
        found.append(_joined(rest[:count]) if count > 1 else rest[0])
        rest = rest[count:]
    return found


def _joined(some: Sequence[Recording]) -> Recording:
    pause = np.zeros(RATE_HZ // 2, np.float32)
    waves = [read_audio(io.BytesIO(own.data), sample_rate_hz=RATE_HZ) for own in some]
    wave = np.concatenate([part for own in waves for part in (own, pause)])
    file = io.BytesIO()
    soundfile.write(file, wave, RATE_HZ, format="FLAC")
    return Recording(f"{some[0].name}.flac", file.getvalue(), len(wave) / RATE_HZ)


async def send_all(
    load: Load, clients: int, note: Callable[[float], None] = lambda share: None
) -> Measured:
    """Sends all requests over `clients` connections. `note` gets the share that was sent."""
    seen, numbers, draws = Measured(), iter(range(load.requests)), random.Random(0)
    limits = httpx.Limits(max_connections=clients)

    async def work(client: httpx.AsyncClient) -> None:
        for number in numbers:
            own = load.recordings[number % len(load.recordings)]
            leaves = _is_nth(number, load.aborted)
            await _one(
                client, own, _is_nth(number, load.streams), _patience(seen, draws, leaves), seen
            )
            note((len(seen.latencies_s) + seen.left + seen.failed) / load.requests)

    async with httpx.AsyncClient(base_url=load.url, timeout=TIMEOUT_S, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return seen


def _is_nth(number: int, share: float) -> bool:
    return int(number * share) != int((number + 1) * share)


def _patience(seen: Measured, draws: random.Random, leaves: bool) -> float | None:
    """Seconds after which the client leaves: at any time of a usual request; None: it stays."""
    usual_s = float(np.median(seen.latencies_s)) if seen.latencies_s else 1.0
    return draws.uniform(0.0, usual_s) if leaves else None


async def _one(
    client: httpx.AsyncClient,
    own: Recording,
    stream: bool,
    patience_s: float | None,
    seen: Measured,
) -> None:
    """Sends one recording, reads the response, and takes it down."""
    start_s, texts_s = time.perf_counter(), list[float]()
    try:
        async with asyncio.timeout(patience_s):
            text = await _text(client, own, stream, texts_s)
    except TimeoutError:
        seen.left += 1
        return
    except FailedError as error:
        seen.failures[str(error)] += 1
        return
    except httpx.HTTPError as error:
        seen.failures[f"{type(error).__name__}: {error}"] += 1
        return
    seen.latencies_s.append(time.perf_counter() - start_s)
    seen.audio_s += own.duration_s
    seen.first_texts_s += [texts_s[0] - start_s] if texts_s else []
    seen.gaps_s += np.diff(texts_s).tolist()
    if own.text is not None and text != own.text:
        seen.wrong.append(f"{own.name} ({own.duration_s:.1f} s): {text!r}, offline {own.text!r}")


async def _text(
    client: httpx.AsyncClient, own: Recording, stream: bool, texts_s: list[float]
) -> str:
    """The whole text of a response. `texts_s` gets the times of the texts of a stream.

    Raises FailedError.
    """
    data, files = {"stream": "true"} if stream else {}, {"file": (own.name, own.data)}
    async with client.stream("POST", PATH, data=data, files=files) as reply:
        if reply.status_code != 200:
            await reply.aread()
            raise FailedError(f"status {reply.status_code}: {_reason(reply.text)}")
        if not stream:
            return json.loads(await reply.aread())["text"]
        text, is_whole = None, False
        async for line in reply.aiter_lines():
            if not line:
                continue
            event = line.removeprefix("data: ")
            is_whole = event == "[DONE]"
            text = text if is_whole else _read_event(json.loads(event), text, texts_s)
    if text is None or not is_whole:
        raise FailedError("a stream without its end")
    return text


def _read_event(event: dict[str, Any], text: str | None, texts_s: list[float]) -> str | None:
    """Takes down an event of a stream; returns the whole text once it is there."""
    if "error" in event:
        raise FailedError(f"within a stream: {event['error']['message']}")
    if event["type"] == "transcript.text.delta":
        texts_s.append(time.perf_counter())
    return event["text"] if event["type"] == "transcript.text.done" else text


def _reason(text: str) -> str:
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:80]


def with_texts(recordings: Sequence[Recording], texts: Sequence[str]) -> list[Recording]:
    """The recordings with the responses that they must have."""
    return [replace(own, text=text) for own, text in zip(recordings, texts, strict=True)]
