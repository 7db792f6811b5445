"""The duplex benchmark: both sides run one model, and the measured work is as stated."""

from argparse import Namespace

import numpy as np
import pytest

from benchmarks import duplex_parts, duplex_session
from benchmarks.duplex_parts import PRESETS
from benchmarks.duplex_work import Conversations, DuplexWork
from speechlm2_jax.models import DuplexS2SModel

MICRO = PRESETS["micro"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    duplex_parts.write(folder, MICRO, weights=False)
    model = DuplexS2SModel(duplex_parts.located(duplex_parts.model_cfg(MICRO), folder))
    return DuplexWork(model, Conversations(batch=2, seconds=0.8))


def test_all_but_the_codec_is_trained(work):
    codec = sum(
        int(np.prod(info.shape))
        for path, info in work.model.infos.items()
        if path.startswith("codec.") and not info.is_buffer
    )
    assert work.count() - work.count(trained_only=True) == codec > 0


def test_conversations_have_one_turn_each_and_no_padding(work):
    arrays, ids = work.batch().arrays, work.model.turn_ids
    assert arrays.target_tokens.shape == (1, 2, 10)
    assert (arrays.source_lengths == 12800).all() and (arrays.target_lengths == 17640).all()
    for tokens in arrays.target_tokens[0]:
        assert (tokens == ids.bos).sum() == (tokens == ids.eos).sum() == 1


@pytest.mark.slow
def test_training_learns_and_conversations_are_as_long_as_asked(work):
    step = work.training("none")
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[0]
    result = work.conversations(1, decode_audio=True)()
    # 80 mel frames through three causal strides: 41, 21, 11, as in NeMo
    assert result["tokens_audio"].shape == (1, 11, 2)
    assert result["audio"].shape == (1, 11 * 1764)


@pytest.mark.slow  # compiles a step
@pytest.mark.parametrize("sessions", [None, 2])
def test_minutes_of_sessions_are_timed(work, sessions):
    arguments = Namespace(window_s=4.0, sessions=sessions)
    session = duplex_session._conversations(work.model, arguments)
    rows = list(duplex_session.minutes(session, 2, 1600))  # minutes of 6 s
    assert [row["minute"] for row in rows] == [1, 2]
    assert 0 < rows[0]["median ms"] <= rows[0]["p95 ms"]
    assert rows[0]["chunk ms"] == pytest.approx(1e3 * session.chunk_s)
    assert rows[0]["state MB"] == rows[1]["state MB"] > 0
