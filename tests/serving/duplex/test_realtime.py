"""OpenAI's Realtime protocol, driven by the official client."""

import asyncio
import base64
import json

import numpy as np
import pytest
from openai import AsyncOpenAI
from websockets.sync.client import connect

from speechlm2_jax.serving.duplex.realtime_events import pcm_base64, pcm_samples
from tests.serving.duplex.fake_sessions import WAIT_S, FakeSessions, quiet, running, tone

SPEECH = np.concatenate([quiet(0.44), tone(0.8), quiet(0.76)])


@pytest.fixture(scope="module")
def server():
    with running(FakeSessions()) as server:
        yield server


def client(server):
    return AsyncOpenAI(api_key="none", websocket_base_url=f"{server.ws}/v1")


async def until(connection, kind, found):
    """Adds events to `found` up to the first one of a kind, and returns it."""
    while True:
        event = await asyncio.wait_for(connection.recv(), WAIT_S)
        found.append(event)
        if event.type == kind:
            return event


async def append(connection, samples, size=1920):
    for start in range(0, len(samples), size):
        audio = pcm_base64(samples[start : start + size])
        await connection.input_audio_buffer.append(audio=audio)


def test_the_official_client_holds_a_conversation(server):
    async def run():
        found = []
        async with client(server).realtime.connect(model="fake") as connection:
            await until(connection, "session.created", found)
            await connection.session.update(
                session={
                    "type": "realtime",
                    "audio": {"input": {"turn_detection": {"type": "server_vad"}}},
                }
            )
            notice = await until(connection, "error", found)
            assert notice.error.code == "turn_detection_ignored"
            await append(connection, SPEECH)
            await until(connection, "response.done", found)
        return found

    found = asyncio.run(run())
    kinds = [event.type for event in found]
    order = [
        "session.created",
        "session.updated",
        "input_audio_buffer.speech_started",
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_audio.delta",
        "response.output_audio_transcript.delta",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
    ]
    at = [kinds.index(kind) for kind in order]
    assert at == sorted(at)
    by_kind = dict(zip(kinds, found, strict=True))
    assert by_kind["session.created"].session.audio.input.format.rate == 24000
    started = by_kind["input_audio_buffer.speech_started"]
    assert started.audio_start_ms == pytest.approx(240, abs=40), "200 ms before the tone"
    stopped = by_kind["input_audio_buffer.speech_stopped"]
    assert stopped.audio_end_ms == pytest.approx(1240, abs=40)
    assert stopped.item_id == started.item_id
    done = by_kind["response.done"].response
    assert done.status == "completed"
    deltas = [e.delta for e in found if e.type == "response.output_audio_transcript.delta"]
    assert done.output[0].content[0].transcript == "".join(deltas) == "6 7 8 9 10 11 12 13 14 15 "
    audio = [pcm_samples(e.delta) for e in found if e.type == "response.output_audio.delta"]
    wave = np.concatenate(audio)
    assert len(wave) == 12 * 1920, "from the frame with the begin token to that with the end token"
    assert np.abs(wave).max() == pytest.approx(0.15, abs=0.01)


def test_cancel_interrupts_the_agent(server):
    sessions = server.service.device._sessions
    before = sessions.interrupted

    async def run():
        found = []
        async with client(server).realtime.connect(model="fake") as connection:
            await connection.response.cancel()
            error = await until(connection, "error", found)
            assert error.error.code == "response_cancel_not_active"
            await append(connection, np.concatenate([quiet(0.4), tone(0.8)]))
            created = await until(connection, "response.created", found)
            await connection.response.cancel(response_id=created.response.id)
            done = await until(connection, "response.done", found)
            assert done.response.id == created.response.id
            await append(connection, tone(0.4))
            await connection.input_audio_buffer.clear()
            await until(connection, "input_audio_buffer.cleared", found)
        return done, found[found.index(done) + 1 :]

    done, later = asyncio.run(run())
    assert done.response.status == "cancelled"
    assert done.response.status_details.reason == "client_cancelled"
    assert {e.type for e in later} <= {
        "input_audio_buffer.cleared",
        "input_audio_buffer.speech_started",
    }
    assert sessions.interrupted == before + 1


WRONG = {
    "no JSON": ("{", "invalid_json", None),
    "no object": ("[1]", None, None),
    "an unknown type": ('{"type": "a.b", "event_id": "e1"}', None, "type"),
    "no audio": ('{"type": "input_audio_buffer.append"}', None, "audio"),
    "half a sample": (
        json.dumps(
            {"type": "input_audio_buffer.append", "audio": base64.b64encode(b"abc").decode()}
        ),
        None,
        "audio",
    ),
    "another format": (
        json.dumps(
            {
                "type": "session.update",
                "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}},
            }
        ),
        None,
        "session.audio.input.format",
    ),
    "a session that is a text": ('{"type": "session.update", "session": "a"}', None, "session"),
    "a response that is asked for": (
        '{"type": "response.create"}',
        "response_create_ignored",
        None,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_event_is_told_and_the_conversation_goes_on(server, what):
    message, code, param = WRONG[what]
    with connect(f"{server.ws}/v1/realtime?model=fake", open_timeout=WAIT_S) as socket:
        assert json.loads(socket.recv(WAIT_S))["type"] == "session.created"
        socket.send(message)
        event = json.loads(socket.recv(WAIT_S))
        assert (event["type"], event["error"]["type"]) == ("error", "invalid_request_error")
        assert (event["error"]["code"], event["error"]["param"]) == (code, param)
        assert event["error"]["event_id"] == ("e1" if "e1" in message else None)
        socket.send('{"type": "input_audio_buffer.commit"}')
        assert json.loads(socket.recv(WAIT_S))["type"] == "input_audio_buffer.committed"


def test_frames_tell_all_audio_and_times_where_they_are_asked_for(server):
    with connect(f"{server.ws}/v1/realtime?frames=true", open_timeout=WAIT_S) as socket:
        socket.recv(WAIT_S)
        audio = pcm_base64(quiet(0.4))
        socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        frames = [json.loads(socket.recv(WAIT_S)) for _ in range(4)]
    assert [f["type"] for f in frames] == ["speechlm2.frames"] * 4
    assert [f["start_s"] for f in frames] == pytest.approx([0.0, 0.08, 0.16, 0.24])
    assert all(len(pcm_samples(f["audio"])) == 1920 and not f["is_in_turn"] for f in frames)
    assert all(f["compute_ms"] >= 0 and f["queue_ms"] >= 0 for f in frames)
