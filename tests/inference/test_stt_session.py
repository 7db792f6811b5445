"""A duplex speech-to-text session gives the frames of offline inference, for any pushes."""

import numpy as np
import pytest

from tests.parity.duplex_golden import recorded_batch
from tests.parity.stt_golden import FACTS, model_with

PROMPT = "the weather"


@pytest.fixture(scope="module")
def model():
    return model_with(**FACTS["inference"]["forced"]["changes"])


def test_frames_equal_offline_inference_for_odd_pushes(model):
    wave = recorded_batch()["source_audio"][0]
    tokens, lengths = model.encode_prompts([PROMPT])
    expected = model.offline_inference(
        wave[None], None, prompt_tokens=tokens, prompt_token_lens=lengths
    )
    session = model.session(system_prompt=PROMPT)
    size = session.state_bytes
    for _ in range(2):
        frames, first = [], 0
        for step in (777, 4001, 1, 12345, 30000, 60000):
            frames += session.push(wave[first : first + step])
            first += step
        frames += session.finish()
        assert [frame.text_token for frame in frames] == expected["tokens_text"][0].tolist()
        theirs = [frame.user_text_token for frame in frames]
        assert theirs == expected["tokens_text_src"][0].tolist()
        assert "".join(frame.user_text for frame in frames) == expected["src_text"][0]
        assert [frame.index for frame in frames] == list(range(len(frames)))
        assert session.state_bytes == size
        session.reset()


def test_an_interrupted_agent_reads_the_end_of_its_turn(model):
    wave = np.asarray(recorded_batch()["source_audio"][0])
    session = model.session()
    frames = list(session.push(wave[:16000]))
    session._is_in_turn = True
    session.interrupt()
    whole = [frame.text_token for frame in [*frames, *session.push(wave[16000:])]]
    plain = model.session()
    alone = [frame.text_token for frame in plain.push(wave)]
    assert whole[: len(frames)] == alone[: len(frames)]
    assert whole != alone
