"""The load of a server: what counts as a response, and what it must be."""

import asyncio
import io
import json

import httpx
import numpy as np
import pytest
import soundfile

from benchmarks.serve_checks import GROWTH_MIB, Server
from benchmarks.serve_load import Load, Recording, mixed_lengths, send_all

DELTAS = [{"type": "transcript.text.delta", "delta": part} for part in ("a", " b", " c")]
DONE = {"type": "transcript.text.done", "text": "a b c"}
ERROR = {"error": {"message": "the model failed"}}
END = "data: [DONE]\n\n"


def stream(*events, end=END):
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return httpx.Response(200, text=lines + end)


def measured(respond, requests=2, **load):
    """What one client sees of a server that responds so."""
    own = Recording("a.wav", b"", 3.0, load.pop("text", None))

    async def run():
        make, transport = httpx.AsyncClient, httpx.MockTransport(respond)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(httpx, "AsyncClient", lambda **more: make(transport=transport, **more))
            return await send_all(Load("http://test", [own], requests, **load), 1)

    return asyncio.run(run())


def raising(request):
    raise httpx.ReadError("reset")


FAILED = {
    "event": (lambda request: stream(*DELTAS, ERROR), "within a stream: the model failed"),
    "no end": (lambda request: stream(*DELTAS, DONE, end=""), "a stream without its end"),
    "no text": (lambda request: stream(*DELTAS), "a stream without its end"),
    "status": (lambda request: httpx.Response(429, json=ERROR), "status 429: the model failed"),
    "connection": (raising, "ReadError: reset"),
}


@pytest.mark.parametrize("what", FAILED)
def test_a_request_without_a_whole_response_fails_alone(what):
    respond, reason = FAILED[what]
    seen = measured(respond, streams=1.0)
    assert seen.failures == {reason: 2}
    assert not seen.latencies_s and not seen.audio_s


def test_waits_are_those_between_the_texts_of_a_stream():
    seen = measured(lambda request: stream(*DELTAS, DONE), streams=1.0)
    assert len(seen.first_texts_s) == 2 and len(seen.gaps_s) == 2 * (len(DELTAS) - 1)
    assert seen.audio_s == 6.0 and not seen.failed
    whole = measured(lambda request: httpx.Response(200, json={"text": "a"}))
    assert len(whole.latencies_s) == 2 and not whole.first_texts_s


@pytest.mark.parametrize(("text", "wrong"), [("a b c", 0), ("a b", 2)])
def test_responses_are_compared(text, wrong):
    seen = measured(lambda request: stream(*DELTAS, DONE), streams=1.0, text=text)
    assert len(seen.wrong) == wrong


def test_clients_leave_a_share_of_the_requests():
    async def slow(request):
        await asyncio.sleep(5)

    seen = measured(slow, requests=1, aborted=1.0)
    assert seen.left == 1 and not seen.failed


def test_mixed_lengths_keep_every_recording_once():
    file = io.BytesIO()
    soundfile.write(file, np.ones(16000) / 2, 16000, format="WAV")
    some = [Recording(f"{n}.wav", file.getvalue(), 1.0) for n in range(7)]
    found = mixed_lengths(some)
    assert [round(own.duration_s, 3) for own in found] == [1.0, 1.0, 3.0, 1.0, 3.0]
    assert soundfile.info(io.BytesIO(found[-1].data)).duration == 3.0


@pytest.mark.parametrize("grown", [0.0, GROWTH_MIB + 1])
def test_a_server_that_is_stuck_or_grows_has_problems(grown, monkeypatch):
    server = Server("http://test")
    server.memory_mib = [(0.1, 1.0), (0.3, 50.0), (1.0, 50.0 + grown)]
    values = {"slots_busy": 0.0, "queue_length": 2.0, "faults_total": 0.0}
    monkeypatch.setattr(server, "_when_idle", lambda: values)
    found = server.problems()
    assert found[0] == "after the load queue_length is 2" and len(found) == 1 + bool(grown)
