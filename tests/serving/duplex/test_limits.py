"""Who is let in, how much of what, and with which code a connection is closed."""

import asyncio
import json
import socket as sockets
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from speechlm2_jax.serving.duplex import pace
from speechlm2_jax.serving.duplex import server as server_module
from speechlm2_jax.serving.duplex.origins import is_known_host, is_known_origin
from speechlm2_jax.serving.duplex.realtime_events import pcm_base64
from speechlm2_jax.serving.duplex.server import server_config
from speechlm2_jax.serving.duplex.service import ConversationService
from tests.serving.duplex.fake_sessions import (
    OPTIONS,
    WAIT_S,
    FakeSessions,
    quiet,
    running,
    tone,
)

PATHS = ("/api/chat", "/v1/realtime")


@pytest.fixture(scope="module")
def server():
    with running(FakeSessions(), max_message_bytes=10_000) as server:
        yield server


@contextmanager
def conversation(server, path="/v1/realtime", **options):
    with connect(server.ws + path, open_timeout=WAIT_S, **options) as socket:
        socket.recv(WAIT_S)
        if path == "/api/chat":
            socket.recv(WAIT_S)
        yield socket


def append(samples):
    return json.dumps({"type": "input_audio_buffer.append", "audio": pcm_base64(samples)})


def closed_with(socket):
    """The code and the reason that a connection is closed with, and the messages before."""
    messages = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            messages.append(socket.recv(WAIT_S))
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason, messages


HOSTS = {
    "localhost": True,
    "localhost:8998": True,
    "127.0.0.1:1": True,
    "[::1]:1": True,
    "192.168.0.7": True,
    "my.name:80": True,
    "other.name": False,
    "localhost.evil.example": False,
    "": False,
    "[": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_name_that_was_made_to_point_here_is_no_host_of_ours(host):
    assert is_known_host(host, ("my.name",)) == HOSTS[host]


def test_only_pages_of_this_server_and_of_named_origins_may_connect():
    assert is_known_origin("http://localhost:1", "localhost:1", ())
    assert not is_known_origin("http://localhost:2", "localhost:1", ())
    assert not is_known_origin("null", "localhost:1", ())
    assert not is_known_origin("http://evil.example", "localhost:1", ())
    assert is_known_origin("https://a.example", "localhost:1", ("https://a.example",))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", ["Origin", "Host"])
def test_a_wrong_origin_or_host_gets_403_and_no_connection(server, path, header):
    before = server.metric("connections_refused_total", reason=header.lower()) or 0
    wrong = {"Origin": "http://evil.example"} if header == "Origin" else {"Host": "evil.example"}
    request = (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\n"
        if header == "Origin"
        else (f"GET {path} HTTP/1.1\r\n")
    )
    request += "".join(f"{name}: {value}\r\n" for name, value in wrong.items())
    request += "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    request += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    with sockets.create_connection(("127.0.0.1", server.port), WAIT_S) as own:
        own.sendall(request.encode())
        assert own.recv(4096).startswith(b"HTTP/1.1 403")
    assert server.metric("connections_refused_total", reason=header.lower()) == before + 1


def test_pages_and_metrics_are_not_for_other_hosts(server):
    for path in ("/metrics", "/v1/models"):
        assert httpx.get(server.http + path, timeout=WAIT_S).status_code == 200
        reply = httpx.get(server.http + path, headers={"Host": "evil.example"}, timeout=WAIT_S)
        assert reply.status_code == 403 and "--allow-host" in reply.json()["error"]["message"]


def test_a_key_comes_by_header_subprotocol_or_query():
    with running(FakeSessions(), api_keys=("secret",)) as server:
        assert httpx.get(f"{server.http}/ready", timeout=WAIT_S).json()["needs_key"]
        for wrong in ({}, {"additional_headers": {"Authorization": "Bearer other"}}):
            with pytest.raises(InvalidStatus) as refused:
                connect(f"{server.ws}/v1/realtime", open_timeout=WAIT_S, **wrong)
            assert refused.value.response.status_code == 401
        with conversation(server, additional_headers={"Authorization": "Bearer secret"}):
            pass
        with conversation(server, "/v1/realtime?key=secret"):
            pass
        names = ["realtime", "openai-insecure-api-key.secret"]
        with conversation(server, subprotocols=names) as socket:
            assert socket.subprotocol == "realtime"


@pytest.mark.parametrize("path", PATHS)
def test_a_giant_message_is_closed_with_1009(server, path):
    with conversation(server, path) as socket:
        giant = "a" * 10_001
        socket.send(giant if path == "/v1/realtime" else b"\x01" + giant.encode())
        assert closed_with(socket)[0] == 1009


def test_binary_events_are_closed_with_1003(server):
    with conversation(server) as socket:
        socket.send(b"\x00")
        code, reason, messages = closed_with(socket)
        assert code == 1003 and json.loads(messages[-1])["error"]["message"] == reason


@pytest.mark.parametrize("path", PATHS)
def test_a_conversation_beyond_the_places_is_closed_with_1013(path):
    with running(FakeSessions(), max_sessions=1) as server:
        with conversation(server), connect(server.ws + path, open_timeout=WAIT_S) as second:
            assert closed_with(second)[:2] == (
                1013,
                "1 conversations are under way, the most at once",
            )
        server.until(lambda: server.service.active == 0)
        with conversation(server, path):
            pass


def test_a_conversation_beyond_its_time_or_without_audio_is_closed_with_1008():
    with running(FakeSessions(), max_session_s=0.3) as server:
        with conversation(server) as socket:
            code, reason, messages = closed_with(socket)
        assert (code, reason) == (1008, "the conversation has reached its limit of 0.3 s")
        assert json.loads(messages[-1])["error"]["code"] == "session_expired"
        assert server.metric("conversations_closed_total", protocol="realtime", code="1008") == 1
    with running(FakeSessions(), idle_timeout_s=0.3) as server, conversation(server) as socket:
        socket.send(append(quiet(0.1)))
        assert closed_with(socket)[:2] == (1008, "no audio came for 0.3 s")


def test_a_session_that_takes_no_more_audio_is_closed_with_its_reason():
    with running(FakeSessions(most=5)) as server, conversation(server) as socket:
        socket.send(append(quiet(0.6)))
        assert closed_with(socket)[:2] == (1008, "no more than 5 frames")


def test_silence_stands_in_for_a_client_that_stalls():
    with running(FakeSessions(), stall_s=0.1) as server:
        with conversation(server, "/v1/realtime?frames=true") as socket:
            socket.send(append(quiet(0.1)))
            frames = [json.loads(socket.recv(WAIT_S)) for _ in range(5)]
        assert [frame["type"] for frame in frames] == ["speechlm2.frames"] * 5
        assert server.metric("audio_filled_seconds_total") >= 0.32
        assert server.metric("audio_stalls_total") >= 1


def test_a_live_users_oldest_audio_is_dropped_if_the_device_is_too_slow():
    sessions = FakeSessions(delay_s=0.5)
    with running(sessions, max_backlog_s=0.2) as server, conversation(server) as socket:
        for _ in range(10):
            socket.send(append(quiet(0.08)))
        labels = {"side": "user", "reason": "overload"}
        server.until(lambda: server.metric("audio_dropped_seconds_total", **labels) >= 0.3)


def test_the_oldest_audio_of_the_agent_is_dropped_for_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(pace, "RECORDING_S", 600.0)  # audio in real time, though it comes at once
    service = ConversationService(
        replace(OPTIONS, max_unsent_s=0.4), lambda options: FakeSessions()
    )
    run_device, wave = service.prepare(), np.concatenate([quiet(0.08), tone(1.6)])

    async def unread():
        device = threading.Thread(target=run_device)
        device.start()
        service._state = None
        with service.conversation(24000) as conversation:
            for start in range(0, len(wave), 1920):
                await conversation.push(wave[start : start + 1920])
                while conversation._line.chunks:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            found = [await conversation.next() for _ in range(19)]
        service.device.stop()
        device.join(WAIT_S)
        return found

    found = asyncio.run(unread())
    assert "".join(c.frames[0].text for c in found) == "".join(f"{n} " for n in range(2, 19))
    lengths = [len(chunk.audio) for chunk in found]
    assert sum(lengths) <= 0.4 * 24000 and lengths[-1] == 1920 and lengths[0] == 0
    dropped = service.metrics.registry.get_sample_value(
        "speechlm2_audio_dropped_seconds_total", {"side": "agent", "reason": "unread"}
    )
    assert dropped == pytest.approx((len(found) * 1920 - sum(lengths)) / 24000, abs=0.09)


def test_a_connection_whose_client_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(server_module, "READ_TIMEOUT_S", 0.01)
    aborts = []

    async def stall():
        config = server_config(ConversationService(OPTIONS, FakeSessions), 1)
        config.load()
        own = server_module.PatientSocket(config, ServerState(), {})
        own.transport = SimpleNamespace(abort=lambda: aborts.append(True))
        own.pause_writing()
        own.resume_writing()
        await asyncio.sleep(0.05)
        assert not aborts
        own.pause_writing()
        await asyncio.sleep(0.1)

    asyncio.run(stall())
    assert aborts == [True]


def test_connects_and_aborts_leave_nothing_behind():
    sessions = FakeSessions()
    with running(sessions, max_sessions=8) as server:
        device, before = server.service.device, threading.active_count()

        def abort(n):
            path = PATHS[n % 2]
            with connect(server.ws + path, open_timeout=WAIT_S) as socket:
                socket.recv(WAIT_S)
                if path == "/v1/realtime" and n % 3:
                    socket.send(append(tone(0.2)))
                if n % 4:  # without a closing handshake
                    socket.socket.shutdown(sockets.SHUT_RDWR)
            server.until(lambda: server.service.active == 0)

        for n in range(100):
            abort(n)
        server.until(lambda: device.lines == 0 and not sessions.open_now)
        server.until(lambda: not server.server.server_state.connections)
        server.until(lambda: threading.active_count() <= before)
        closed = sum(
            sample.value
            for metric in server.service.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "speechlm2_conversations_closed_total"
        )
        assert closed == 100 and server.metric("conversations") == 0


def test_the_readiness_and_metrics_are_told(server):
    ready = httpx.get(f"{server.http}/ready", timeout=WAIT_S).json()
    assert ready["model"] == "fake" and ready["chunk_ms"] == 80 and not ready["needs_key"]
    assert httpx.get(f"{server.http}/v1/models", timeout=WAIT_S).json()["data"][0]["id"] == "fake"
    with conversation(server) as socket:
        socket.send(append(np.concatenate([quiet(0.05), tone(0.05)])))
        server.until(lambda: server.metric("frames_total") >= 1)
    text = httpx.get(f"{server.http}/metrics", timeout=WAIT_S).text
    for name in ("compute", "queue", "interval", "response"):
        assert f"speechlm2_frame_{name}_seconds_bucket" in text
