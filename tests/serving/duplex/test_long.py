"""Both protocols hold a conversation of ten minutes, sent faster than real time."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import sphn
from websockets.sync.client import connect

from speechlm2_jax.serving.duplex.realtime_events import pcm_base64, pcm_samples
from speechlm2_jax.serving.duplex.sessions import PoolSessions
from tests.parity.duplex_golden import pretrained
from tests.serving.duplex.fake_sessions import OPTIONS, WAIT_S, FakeSessions, quiet, running, tone

pytestmark = pytest.mark.slow
FRAME = 1920
FRAMES = 7500
MINUTE = np.concatenate([quiet(1.04), tone(0.96)] * 30)


def frame(number):
    start = number * FRAME % len(MINUTE)
    return MINUTE[start : start + FRAME]


def sending(send):
    """A thread that sends every frame."""
    thread = threading.Thread(target=lambda: [send(frame(n)) for n in range(FRAMES)])
    thread.start()
    return thread


def test_realtime_with_a_model():
    sessions = PoolSessions(
        pretrained("duplex_s2s_speech_decoder_cfg"),
        replace(OPTIONS, session_window_s=4.0, max_sessions=1, max_load=1e9),
    )
    with running(sessions) as server:
        with connect(
            f"{server.ws}/v1/realtime?frames=true", open_timeout=WAIT_S, ping_interval=None
        ) as socket:

            def send(samples):
                audio = pcm_base64(samples)
                socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))

            thread, tokens, samples, ends = sending(send), 0, 0, []
            while tokens < FRAMES - 2:
                event = json.loads(socket.recv(WAIT_S))
                if event["type"] == "speechlm2.frames":
                    tokens += len(event["tokens"])
                    samples += len(pcm_samples(event["audio"]))
                    ends.append(event["end_s"])
            thread.join()
        assert ends[-1] == pytest.approx(600, abs=0.2) and ends == sorted(ends)
        assert samples / 24000 == pytest.approx(600, abs=0.3)
        assert server.metric("frames_total") == tokens
        for labels in (("user", "late"), ("user", "overload"), ("agent", "unread")):
            names = dict(zip(("side", "reason"), labels, strict=True))
            assert server.metric("audio_dropped_seconds_total", **names) == 0


def test_moshi():
    with running(FakeSessions()) as server:
        with connect(f"{server.ws}/api/chat", open_timeout=WAIT_S, ping_interval=None) as socket:
            writer, reader = sphn.OpusStreamWriter(24000), sphn.OpusStreamReader(24000)
            thread = sending(lambda own: socket.send(b"\x01" + bytes(writer.append_pcm(own))))
            samples, words = 0, 0
            while samples < (FRAMES - 3) * FRAME:
                message = socket.recv(WAIT_S)
                if message[0] == 1:
                    samples += len(reader.append_bytes(message[1:]))
                words += len(message[1:].split()) if message[0] == 2 else 0
            thread.join()
        assert words >= 300 * 11
        assert server.metric("frames_total") >= FRAMES - 3
