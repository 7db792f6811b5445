"""What a server refuses, and that it lives on: bad input, a full queue, killed workers."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import httpx
import numpy as np
import pytest
import soundfile

from speechlm2_jax.serving import chat as chats
from speechlm2_jax.serving import guard
from speechlm2_jax.serving.chat import MAX_MARKS
from tests.serving.server_case import load_tiny, recording, running, wav_bytes

KEY = "a-key"
CHAT = [{"role": "user", "content": "What is it?"}]
FULL_CHAT = json.dumps(dict(messages=CHAT, model="tiny")).encode()


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
    "no audio": (dict(file=b"no audio at all"), 400, "file: not an audio file, or damaged: "),
    "empty": (dict(file=b""), 400, "file: the upload is empty"),
    "absurd": (dict(file=wav_bytes(np.full((99, 2), 3e38))), 400, "absurdly large"),
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
        "timestamp_granularities[]: word: this server has no aligner",
    ),
    "twice": (
        {"file": FINE, "temperature": ["0", "1"]},
        400,
        "temperature: given 2 times; give it once",
    ),
    "srt stream": (dict(file=FINE, response_format="srt", stream="true"), 400, "stream: needs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_upload_is_refused_by_name(client, what):
    fields, status, message = WRONG[what]
    reply = transcribe(client, **fields)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]


RECORDING = {"data": base64.b64encode(FINE).decode(), "format": "wav"}
LONG_RECORDING = {"data": base64.b64encode(wav_bytes(np.tile(recording(0), 2))).decode()}


def user(content="a", **more):
    return [{"role": "user", "content": content, **more}]


def about(audio, **more):
    return user([{"type": "input_audio", "input_audio": audio, **more}])


WRONG_CHATS = {
    "huge number": (dict(temperature=10**400), "temperature: expected a number"),
    "top_logprobs": (dict(logprobs=True, top_logprobs=2), "top_logprobs: not supported: the log"),
    "stream options": (dict(stream=True, stream_options=[1]), "stream_options: expected an obj"),
    "stream option": (dict(stream=True, stream_options={"a": 1}), "stream_options.a: unknown"),
    "usage": (
        dict(stream=True, stream_options={"include_usage": "yes"}),
        "stream_options.include_usage: expected true or false, got 'yes'",
    ),
    "no stream": (dict(stream_options={"include_usage": True}), "stream_options: needs stream"),
    "store": (dict(store=True), "store: not supported: responses are not kept"),
    "tier": (dict(service_tier="priority"), "service_tier: not supported: there is one tier"),
    "name": (dict(messages=user(name="A")), "messages[0].name: not supported; the server reads"),
    "part": (
        dict(messages=about(RECORDING, detail="low")),
        "messages[0].content[0].detail: not supported",
    ),
    "format": (
        dict(messages=about({**RECORDING, "format": 1})),
        "messages[0].content[0].input_audio.format: expected a text, got 1",
    ),
    "stop": (
        dict(messages=about(LONG_RECORDING), stop="a"),
        "stop: not supported with a recording of 0.9 s, which is more than --max-audio-s 0.5",
    ),
    "logprobs": (
        dict(messages=about(LONG_RECORDING), logprobs=True, stream=True),
        "logprobs: not supported with a recording of 0.9 s",
    ),
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


def test_what_changes_nothing_is_accepted(client):
    copied = {"role": "assistant", "content": "a", "tool_calls": None, "annotations": []}
    fields = dict(store=False, service_tier="auto", metadata={"a": "b"}, user="me", top_logprobs=0)
    assert chat(client, messages=[*user(), copied, *user()], max_tokens=1, **fields).is_success


SILENCE = {"data": base64.b64encode(flac_of(np.zeros(6 * 16000))).decode()}
TOO_MUCH = {
    "values": (dict(metadata=[0] * (MAX_MARKS + 1)), f"more than {MAX_MARKS} values and escapes"),
    "text": (dict(messages=2 * user("a" * 60_000)), "more than 100000 characters of text"),
    "audio": (
        dict(messages=2 * about(SILENCE)),
        "messages[1].content[0].input_audio: the recordings up to here have 12 s, and the limit",
    ),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_a_chat_with_too_much_is_refused_before_it_is_run(client, what, monkeypatch):
    monkeypatch.setattr(chats, "MAX_TEXT", 100_000)
    fields, message = TOO_MUCH[what]
    reply = chat(client, **fields)
    assert reply.status_code == 413 and message in reply.json()["error"]["message"]


def test_no_base64_and_no_json(client):
    part = {"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}}
    reply = chat(client, messages=[{"role": "user", "content": [part]}])
    assert reply.status_code == 400 and "is not base64" in reply.text
    reply = client.post("/v1/chat/completions", content=b"{" * 5000)
    assert reply.status_code == 400 and "not JSON" in reply.text


@pytest.mark.parametrize(
    "body",
    [
        rb'{"messages":[{"role":"user","content":"hi \ud800"}],"stream":true}',
        rb'{"messages":[{"role":"user","content":"hi","a\ud800":1}]}',
        rb'{"a\udfff":1}',
        b'{"a\xed\xa0\x80":1}',
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(client, body):
    reply = client.post("/v1/chat/completions", content=body)
    assert reply.status_code == 400 and "the body is not Unicode" in reply.text


@pytest.mark.parametrize("field", ["model", "a\\ud800"])
def test_a_form_that_is_not_unicode_is_refused(client, field):
    body = f'--x\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n\\ud800\r\n'
    body += '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\na\r\n--x--'
    kind = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    reply = client.post("/v1/audio/transcriptions", content=body.encode(), headers=kind)
    assert reply.status_code == 400 and "the body is not Unicode" in reply.text


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


@contextmanager
def begun(server, body=b"{"):
    """A connection that has sent the headers of a chat and the beginning of its body."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=20) as own:
        own.sendall(f"{head}Content-Length: {len(FULL_CHAT)}\r\n\r\n".encode() + body)
        yield own


def test_requests_have_their_place_before_their_bodies_are_read(server, client):
    with begun(server), begun(server):
        until(lambda: server.service.active == 2)
        assert chat(client).status_code == 429
    until(lambda: server.service.active == 0)
    assert chat(client).status_code == 200


def test_who_waits_for_an_audio_worker_is_limited_and_may_leave(server, client, monkeypatch):
    service = server.service
    left = requests_of(service, 499, "/v1/audio/transcriptions")
    monkeypatch.setattr(service.workers, "decode", lambda *given: asyncio.sleep(60))
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/audio/transcriptions", files={"file": FINE}, timeout=0.5)
    until(lambda: requests_of(service, 499, "/v1/audio/transcriptions") == left + 1)
    monkeypatch.setattr(service, "options", replace(service.options, request_timeout_s=0.1))
    assert transcribe(client, FINE).status_code == 504
    assert service.active == 0


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


def count(service, name, **labels):
    return service.metrics.registry.get_sample_value(f"speechlm2_{name}", labels) or 0.0


def requests_of(service, status, path="/v1/chat/completions"):
    return count(service, "requests_total", endpoint=path, status=str(status))


def test_streams_are_counted_when_they_end_by_how_they_ended(server, client, monkeypatch):
    service, path = server.service, "/v1/chat/completions"
    body = dict(messages=CHAT, model="tiny", stream=True)
    before = {status: requests_of(service, status) for status in (200, 400, 429, 499, 500, 504)}
    firsts = count(service, "time_to_first_token_seconds_count")
    seconds = count(service, "request_seconds_sum", endpoint=path)
    decode = service.scheduler._device.decode
    monkeypatch.setattr(service.scheduler._device, "decode", lambda n: time.sleep(0.1) or decode(n))
    assert client.post(path, json=body).is_success
    monkeypatch.undo()
    until(lambda: requests_of(service, 200) > before[200])
    assert count(service, "request_seconds_sum", endpoint=path) - seconds > 0.1
    assert count(service, "time_to_first_token_seconds_count") == firsts + 1

    def broken(tokens):
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.scheduler._device, "decode", broken)
    assert "RuntimeError" in client.post(path, json=body).text
    long = [{"role": "user", "content": "word " * 200}]
    assert "has room for" in client.post(path, json={**body, "messages": long}).text
    until(lambda: service.active == 0)
    monkeypatch.setattr(service, "active", 2)
    assert client.post(path, json=body).status_code == 429
    monkeypatch.undo()
    monkeypatch.setattr(service.scheduler._device, "decode", lambda tokens: time.sleep(0.01) or [])
    with client.stream("POST", path, json=body) as left:
        next(left.iter_lines())
    until(lambda: requests_of(service, 499) > before[499])
    monkeypatch.undo()
    found = {status: requests_of(service, status) - before[status] for status in before}
    assert found == {200: 1, 400: 1, 429: 1, 499: 1, 500: 1, 504: 0}


def test_a_client_that_leaves_while_it_sends_is_no_fault(server):
    before = requests_of(server.service, 499), requests_of(server.service, 500)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=20) as leaving:
        leaving.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.1)
    until(lambda: requests_of(server.service, 499) == before[0] + 1)
    assert requests_of(server.service, 500) == before[1]


def test_slow_and_hostile_connections_end(server, client, monkeypatch):
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address, timeout=20) as slow:
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection(address, timeout=20) as bomb:
        bomb.sendall(head.encode() + b"X: " + b"a" * (1 << 17))
        assert bomb.recv(4096).startswith(b"HTTP/1.1 400")
    monkeypatch.setattr(guard, "MAX_HEADER_BYTES", 6000)
    with socket.create_connection(address, timeout=20) as many:
        many.sendall(head.encode() + b"X: 1\r\n" * 1000 + b"\r\n")
        assert many.recv(4096).startswith(b"HTTP/1.1 431")
    monkeypatch.setattr(guard, "HEADER_TIMEOUT_S", 0.2)
    with socket.create_connection(address, timeout=20) as never:
        never.sendall(b"GET / HT")
        assert never.recv(4096) == b""
    assert chat(client).status_code == 200


EARLY = {
    "no key": "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
    "too large": "POST /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a-key\r\n"
    "Content-Length: 9000000\r\n\r\n",
    "not read": "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
}


@pytest.mark.parametrize("what", EARLY)
@pytest.mark.parametrize("rest", ["{", "{" * 9 + "GET / HT"])
def test_a_connection_that_had_its_response_before_its_request_ends(
    server, what, rest, monkeypatch
):
    """The rest of the request ends uvicorn's own timer of idle connections."""
    monkeypatch.setattr(guard, "HEADER_TIMEOUT_S", 0.2)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=4) as early:
        early.sendall(EARLY[what].encode())
        assert early.recv(4096).startswith(b"HTTP/1.1 ")
        early.sendall(rest[: 1 if what == "not read" else None].encode())
        while early.recv(4096):
            pass


def test_a_client_that_does_not_read_its_responses_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(guard, "READ_TIMEOUT_S", 0.2)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    connections = server.server.server_state.connections
    before = len(connections)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(4)
        deaf.connect(address)
        until(lambda: len(connections) == before + 1)
        with suppress(OSError):
            for _ in range(200):
                deaf.sendall(b"GET /page.js HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
        until(lambda: len(connections) == before)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(server):
    """On a server of its own, which ends by it. Its programs are compiled already."""
    with running(load_tiny(), slots=1) as own:
        device = own.service.scheduler._device
        decode, refusals_seen = device.decode, threading.Event()
        device.decode = lambda tokens: decode(tokens if refusals_seen.wait(30) else 0)
        with httpx.Client(base_url=own.url, timeout=60) as client:
            body = dict(messages=CHAT, model="tiny", stream=True)
            stream_of = client.stream("POST", "/v1/chat/completions", json=body)
            with stream_of as stream, begun(own, FULL_CHAT[:9]) as upload:
                lines = stream.iter_lines()
                next(lines)
                until(lambda: own.service.active == 2)
                own.loop.call_soon_threadsafe(own.server.handle_exit, signal.SIGTERM, None)
                until(lambda: own.service.is_draining)
                refused = httpx.post(f"{own.url}/v1/chat/completions", json=body)
                assert refused.status_code == 503 and "shutting down" in refused.text
                assert httpx.get(f"{own.url}/ready").status_code == 503
                refusals_seen.set()
                upload.sendall(FULL_CHAT[9:])
                assert list(filter(None, lines))[-1] == "data: [DONE]"
                assert upload.recv(4096).startswith(b"HTTP/1.1 200")
        own.thread.join(20)
        assert not own.thread.is_alive()
