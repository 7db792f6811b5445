"""Benchmarks do the peer's work, and compare what they say they compare."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import side_by_side, timing
from benchmarks.presets import PRESETS
from benchmarks.salm_work import Sizes, Work

# (all, trained) parameters of the PyTorch peer's presets, counted there
PEER_COUNTS = {
    "tiny": (6_295_168, 2_122_624),
    "small": (60_141_824, 20_156_160),
    "large": (234_316_288, 109_647_616),
    "canary-qwen-2.5b": (2_559_348_736, 838_773_760),
}


@pytest.fixture(scope="module")
def small_work():
    llm = replace(PRESETS["tiny"].llm, layers=1, vocab_size=64, width=16, mlp_width=32)
    preset = replace(
        PRESETS["tiny"], encoder_layers=1, encoder_width=16, encoder_heads=2, llm=llm, mel_bins=8
    )
    sizes = Sizes(batch=2, seconds=0.4, prompt=3, response=4)
    return Work(preset, sizes, preset.network())


@pytest.mark.parametrize("name", PEER_COUNTS)
def test_presets_have_the_peers_parameters(name, monkeypatch):
    monkeypatch.setattr("benchmarks.salm_work.draw", lambda make, layout: {})  # 10 GB of weights
    work = Work(PRESETS[name], Sizes(), PRESETS[name].network())
    assert (work.count(), work.count(trained_only=True)) == PEER_COUNTS[name]


def test_only_responses_are_scored_and_all_of_them(small_work):
    rows = small_work.training_batch.arrays.rows
    frames = 5  # 40 mel frames over 8
    assert rows.tokens.shape == (1, 2, 3 + frames + 4)
    assert (rows.loss_mask.sum(axis=-1) == 4).all()
    scored = rows.targets[rows.loss_mask].reshape(2, 4)
    np.testing.assert_array_equal(scored, rows.tokens[0, :, -4:])


@pytest.mark.slow
def test_training_step_learns_its_batch(small_work):
    step = small_work.training()
    losses = [step() for _ in range(3)]
    assert losses[0] == pytest.approx(np.log(64), rel=0.02)  # random weights guess at random
    assert losses[2] < losses[0]


def test_responses_have_exactly_the_asked_tokens(small_work):
    ids = small_work.generation()()
    assert ids.shape == (2, 4)
    assert ((ids >= 0) & (ids < 64)).all()


def test_flops_grow_as_what_is_computed(small_work):
    assert 2 < small_work.training_flops() / small_work.forward_flops() < 3


def prints(**result):
    return [sys.executable, "-c", f"print('noise'); print({json.dumps(json.dumps(result))})"]


def test_side_by_side_divides_theirs_by_ours():
    ours = side_by_side.run(prints(train_step_s=[2.0, 1.0, 3.0], generate_s=1.0, seconds=8.0))
    theirs = side_by_side.run(prints(train_step_s=[3.0, 3.0, 3.0], generate_s=4.0, other_s=1.0))
    rounds = [
        {"ours": ours, "theirs": theirs},
        {"ours": ours, "theirs": {**theirs, "generate_s": 1.0}},
    ]
    table = side_by_side.summarise(rounds)
    assert table["train_step_s"]["ratio"] == pytest.approx(1.5)
    assert set(table) == {"train_step_s", "generate_s"}
    # of the rounds 4x and 1x the geometric mean is 2x
    assert [table["generate_s"][k] for k in ("ratio", "least", "most")] == pytest.approx([2, 1, 4])


def test_a_failed_command_prints_its_error():
    with pytest.raises(SystemExit, match="no such preset"):
        side_by_side.run([sys.executable, "-c", "raise SystemExit('no such preset')"])


def test_timing_gives_median_and_extremes(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 6.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.measure(lambda: None, repeats=3, warmup=0).as_list() == [2.0, 1.0, 3.0]


def test_model_half_needs_no_data_packages():
    code = (
        "import sys, benchmarks.salm, benchmarks.side_by_side;"
        "print([m for m in ('torch', 'lhotse', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
