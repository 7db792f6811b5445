"""The server's sessions are those of a model: its tokens, its audio, and what cannot stream."""

import json
from dataclasses import replace

import numpy as np
import pytest
from websockets.sync.client import connect

from speechlm2_jax.data.audio import resample
from speechlm2_jax.data.stream_resampler import StreamResampler
from speechlm2_jax.serving.duplex import load
from speechlm2_jax.serving.duplex.realtime_events import pcm_base64, pcm_samples
from speechlm2_jax.serving.duplex.sessions import PoolSessions
from speechlm2_jax.settings import SettingsError
from tests.parity.duplex_golden import DATA, hf, pretrained, recorded_batch
from tests.parity.salm_golden import working_in
from tests.serving.duplex.fake_sessions import OPTIONS, WAIT_S, running

RUN = "duplex_s2s_speech_decoder_cfg"


@pytest.fixture(scope="module")
def sessions():
    return PoolSessions(
        pretrained(RUN), replace(OPTIONS, session_window_s=4.0, max_sessions=2, max_load=1e9)
    )


def user_audio():
    batch = recorded_batch()
    wave = batch["source_audio"][0, : batch["source_audio_lens"][0]]
    return resample(wave, 16000, 24000)


def test_a_conversation_has_the_tokens_and_the_audio_of_a_session(sessions):
    sent = [pcm_base64(user_audio()[n : n + 1000]) for n in range(0, len(user_audio()), 1000)]
    resampler, alone = StreamResampler(24000, 16000), sessions.open()
    ahead = np.zeros(round(resampler.delay_s * 24000), np.float32)
    wave = [resampler.push(ahead), *(resampler.push(pcm_samples(text)) for text in sent)]
    wave = np.concatenate(wave)
    size = sessions.facts.chunk_samples
    chunks = [wave[n : n + size] for n in range(0, len(wave) - size + 1, size)]
    expected = [frame for chunk in chunks for frame in sessions.step({alone: chunk})[alone]]
    sessions.close(alone)
    assert len(expected) > 20 and sessions.facts.chunk_s == 0.16
    output = StreamResampler(sessions.facts.output_hz, 24000)
    audio = np.concatenate([output.push(frame.audio) for frame in expected])
    with running(sessions) as server:
        for _ in range(2):  # a session that has ended is used again
            tokens, pieces = [], []
            with connect(f"{server.ws}/v1/realtime?frames=true", open_timeout=WAIT_S) as socket:
                for text in sent:
                    socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": text}))
                while len(tokens) < len(expected):
                    event = json.loads(socket.recv(WAIT_S))
                    if event["type"] == "speechlm2.frames":
                        tokens += event["tokens"]
                        pieces.append(pcm_samples(event["audio"]))
            assert tokens == [frame.text_token for frame in expected]
            found = np.concatenate(pieces)
            expected_audio = np.clip(audio[: len(found)], -1, 1)
            np.testing.assert_allclose(found, expected_audio, atol=1e-3)
            server.until(lambda: server.service.device.lines == 0)


def test_what_is_no_duplex_model_and_what_cannot_stream_is_told(monkeypatch):
    salm = DATA.parent / "salm" / "llama_adapter_hf"
    with pytest.raises(SettingsError, match="is a SALM; a full-duplex model is needed$"):
        load.open_sessions(replace(OPTIONS, model=str(salm)))

    def refuse(model, options):
        raise ValueError("this model has no sessions: model.perception.preprocessor.normalize")

    monkeypatch.setattr(load, "PoolSessions", refuse)
    own = replace(OPTIONS, model=str(hf(RUN)))
    with working_in(DATA), pytest.raises(SettingsError, match="no sessions: model.perception"):
        load.open_sessions(own)
