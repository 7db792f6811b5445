"""What a server refuses, and that it lives on: bad input, a full queue, killed workers."""

import io
import os
import signal
import socket
import time

import httpx
import numpy as np
import pytest
import soundfile

from speechlm2_jax.serving import guard
from tests.serving.server_case import load_tiny, recording, running, wav_bytes

KEY = "a-key"
CHAT = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def server():
    limits = dict(
        api_keys=("another", KEY),
        max_queue=1,
        slots=1,
        max_body_bytes=1 << 20,
        max_duration_s=10.0,
        body_timeout_s=1.0,
        language="en",
    )
    with running(load_tiny(), **limits) as server:
        yield server


@pytest.fixture
def client(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def transcribe(client, file=None, **fields):
    files = {} if file is None else {"file": ("a.wav", file)}
    return client.post("/v1/audio/transcriptions", files=files, data={"model": "tiny", **fields})


def chat(client, **fields):
    return client.post("/v1/chat/completions", json={"messages": CHAT, "model": "tiny", **fields})


def flac_of(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="FLAC")
    return file.getvalue()


FINE = wav_bytes(recording(0))
HALF = flac_of(recording(0))[:-4000]
WRONG = {
    "no file": ({}, 400, "file: send one audio file"),
    "no audio": (dict(file=b"no audio at all"), 400, "file: "),
    "empty": (dict(file=b""), 400, "file: the upload is empty"),
    "truncated": (dict(file=HALF), 400, "file: "),
    "hours": (
        dict(file=flac_of(np.zeros(36 * 16000))),
        413,
        "file: 36 s of audio, and the limit is 10 s",
    ),
    "large": (dict(file=bytes(2 << 20)), 413, "larger than 1 MiB"),
    "model": (dict(file=FINE, model="whisper-1"), 404, "'whisper-1' is not served"),
    "language": (dict(file=FINE, language="fr"), 400, "language: this server transcribes en"),
    "temperature": (dict(file=FINE, temperature="hot"), 400, "temperature: expected a number"),
    "unknown": (dict(file=FINE, temprature="1"), 400, "temprature: unknown"),
    "words": (
        {"file": FINE, "response_format": "verbose_json", "timestamp_granularities[]": "word"},
        400,
        "timestamp_granularities[]: word",
    ),
    "srt stream": (dict(file=FINE, response_format="srt", stream="true"), 400, "stream: needs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_upload_is_refused_by_name(client, what):
    fields, status, message = WRONG[what]
    reply = transcribe(client, **fields)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]


WRONG_CHATS = {
    "tools": (dict(tools=[{"type": "function"}]), "tools: not supported"),
    "n": (dict(n=2), "n: not supported"),
    "seed": (dict(seed="x"), "seed: expected a number"),
    "tokens": (dict(max_tokens=10**6), "max_tokens: expected 1 to 12"),
    "messages": (dict(messages=[]), "messages: expected a list"),
    "role": (dict(messages=[{"role": "tool", "content": "a"}]), "messages[0].role"),
    "image": (
        dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0]: expected text or input_audio; got 'image_url'",
    ),
    "long": (dict(messages=[{"role": "user", "content": "word " * 200}]), "the server has room"),
}


@pytest.mark.parametrize("what", WRONG_CHATS)
def test_a_wrong_chat_is_refused_by_name(client, what):
    fields, message = WRONG_CHATS[what]
    reply = chat(client, **fields)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]


def test_no_base64_and_no_json(client):
    part = {"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}}
    reply = chat(client, messages=[{"role": "user", "content": [part]}])
    assert reply.status_code == 400 and "is not base64" in reply.text
    reply = client.post("/v1/chat/completions", content=b"{" * 5000)
    assert reply.status_code == 400 and "not JSON" in reply.text


def test_a_key_is_needed_where_one_is_set(server, client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    for headers in ({}, {"Authorization": "Bearer a-kez"}, {"Authorization": KEY}):
        reply = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json()["status"] == "ready"


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_place(server, client):
    service = server.service
    opened = [
        client.build_request(
            "POST",
            "/v1/chat/completions",
            json=dict(messages=CHAT, model="tiny", stream=True, max_tokens=12),
        )
        for _ in range(2)
    ]
    service.scheduler._device.decode = lambda tokens: time.sleep(0.01) or []
    try:
        streams = [client.send(request, stream=True) for request in opened]
        reply = chat(client)
        assert reply.status_code == 429 and int(reply.headers["Retry-After"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"
        [stream.close() for stream in streams]
        until(lambda: service.active == 0)
    finally:
        del service.scheduler._device.decode
    assert chat(client).status_code == 200
    until(lambda: not service.scheduler._device.busy)


def until(is_so):
    end_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_killed_audio_worker_is_replaced_and_no_request_notices(server, client):
    workers = server.service.workers
    (pid,) = workers.process_ids()
    os.kill(pid, signal.SIGKILL)
    reply = transcribe(client, FINE)
    assert reply.status_code == 200 and reply.json()["text"]
    assert workers.replaced == 1 and workers.process_ids() != [pid]


def test_a_fault_of_the_device_fails_what_runs_and_nothing_else(server, client, monkeypatch):
    device = server.service.scheduler._device

    def broken(tokens):
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(device, "decode", broken)
    reply = chat(client)
    assert reply.status_code == 500 and "RuntimeError: out of memory" in reply.text
    assert chat(client).status_code == 200
    assert "speechlm2_faults_total 1.0" in client.get("/metrics").text


def test_slow_and_hostile_connections_end(server, client, monkeypatch):
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address, timeout=20) as slow:
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection(address, timeout=20) as bomb:
        bomb.sendall(head.encode() + b"X: " + b"a" * (1 << 17))
        assert bomb.recv(4096).startswith(b"HTTP/1.1 400")
    monkeypatch.setattr(guard, "HEADER_TIMEOUT_S", 0.2)
    with socket.create_connection(address, timeout=20) as never:
        never.sendall(b"GET / HT")
        assert never.recv(4096) == b""
    assert chat(client).status_code == 200


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(server):
    """On a server of its own, which ends by it. Its programs are compiled already."""
    with running(load_tiny(), slots=1) as own:
        device = own.service.scheduler._device
        decode = device.decode
        device.decode = lambda tokens: time.sleep(0.2) or decode(1)
        with httpx.Client(base_url=own.url, timeout=60) as client:
            body = dict(messages=CHAT, model="tiny", stream=True)
            with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                own.loop.call_soon_threadsafe(own.server.handle_exit, signal.SIGTERM, None)
                until(lambda: own.service.is_draining)
                refused = httpx.post(f"{own.url}/v1/chat/completions", json=body)
                assert refused.status_code == 503 and "shutting down" in refused.text
                assert httpx.get(f"{own.url}/ready").status_code == 503
                assert list(filter(None, lines))[-1] == "data: [DONE]"
        own.thread.join(20)
        assert not own.thread.is_alive()
