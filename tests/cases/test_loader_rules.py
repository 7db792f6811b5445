"""Keys at NeMo's defaults, rows that are dropped or far too long, sources without weights."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.contents import check_roles
from speechlm2_jax.data.duplex.conversations import DuplexConversation, SpokenTurn
from speechlm2_jax.data.outliers import far_out
from speechlm2_jax.settings import SettingsError, build

DATA = Path(__file__).parents[1] / "data"
DEFAULTS = json.loads((DATA / "from_nemo" / "loader_defaults.json").read_text())
TAG = "<|audioplaceholder|>"
MINE = {"batch_size": 2, "manifest_filepath": "m.jsonl"}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(DATA / "llm" / "qwen3")
    tokenizer.add_special_tokens([TAG])
    return tokenizer


@pytest.fixture
def make(tmp_path, tokenizer, caplog):
    """A data module of manifests of rows; each set of rows is a source."""
    caplog.set_level(logging.INFO)
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1, np.float32), 16000)

    def one(*sources, which="train_ds", entry=(), **keys):
        entries = []
        for number, rows in enumerate(sources):
            path = tmp_path / f"m{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            entries.append({"manifest_filepath": str(path), **dict(entry)})
        cfg = {"input_cfg": entries, "prompt_format": "qwen", "batch_size": 4}
        cfg |= {"token_equivalent_duration": 0.08, **keys}
        block = cfg if which == "train_ds" else {"datasets": {"v": cfg}}
        module = DataModule({which: block}, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=lambda samples: samples // 1280)
        return module

    return one


def row(path="a.wav", **more):
    return {"audio_filepath": path, "duration": 0.5, "text": "yes", **more}


@pytest.mark.parametrize("kind", [DataLoaderConfig, DuplexLoaderConfig])
@pytest.mark.parametrize("key", DEFAULTS)
def test_every_key_of_nemos_loader_is_accepted_at_its_default(kind, key):
    if key not in MINE:
        value = float("inf") if DEFAULTS[key] == ".inf" else DEFAULTS[key]
        build(kind, {**MINE, key: value}, "data.train_ds")


REFUSED = {"multi_config": True}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_refused_when_switched_on(key):
    with pytest.raises(SettingsError, match=f"data.train_ds.{key}: "):
        build(DataLoaderConfig, {**MINE, key: REFUSED[key]}, "data.train_ds")


def test_dropped_rows_are_counted_by_row_not_by_id(make):
    rows = [row(f"spk{n}/001.wav") for n in range(3)]
    module = make([*rows, row()], which="validation_ds")
    for _ in range(2):  # a second pass meets the same rows
        list(module.validation_batches()["v"])
    assert module.dropped == {"missing": 3}


@pytest.mark.parametrize("which", ["train_ds", "validation_ds"])
@pytest.mark.parametrize(
    ("odd", "cause", "detail"),
    [
        ({"duration": 36000.0, "sampling_rate": 16000}, "seconds_far_too_many", "36,000 seconds"),
        ({"text": "word " * 20000}, "tokens_far_too_many", " tokens, of the others"),
    ],
)
def test_a_row_far_longer_than_all_else_is_left_out_and_named(
    make, caplog, which, odd, cause, detail
):
    rows = [*[row(id=f"g{n}") for n in range(8)], row(id="odd-one", **odd)]
    module = make(rows, which=which)
    assert module.dropped == {cause: 1}
    message = next(m for m in caplog.messages if cause in m)
    assert "odd-one" in message and "m0.jsonl line 9: " in message and detail in message
    assert "keep_outliers: true keeps them" in message
    name = which if which == "train_ds" else f"{which}.v"
    assert module.plan(name).buckets[-1].shape.tokens < 100
    caplog.clear()
    module = make(rows, which=which, keep_outliers=True)
    assert module.dropped == {} and any(
        "kept by keep_outliers" in m and "odd-one" in m for m in caplog.messages
    )
    assert module.plan(name).buckets[-1].shape.tokens > 10_000


def test_what_is_far_out_is_measured_by_the_other_rows():
    for rows in (3, 8, 30, 1000):
        lengths = np.full(rows, 5.0)
        lengths[-1] = 101.0
        is_far, usual = far_out(lengths, "seconds")
        assert is_far.tolist() == [False] * (rows - 1) + [True] and usual == 5.0
        lengths[-1] = 100.0  # not more than 20 times
        assert not far_out(lengths, "seconds")[0].any()
    assert far_out(np.asarray([5.0] * 7 + [101.0, 36000.0]), "seconds")[0].sum() == 2
    # one of a hundred and one is a kind of row, and none that is wrong
    assert not far_out(np.asarray([1.0] * 190 + [100.0] * 10), "seconds")[0].any()
    # neither two rows, nor rows without a length, nor short ones tell which is wrong
    assert not far_out(np.asarray([1.0, 36000.0]), "seconds")[0].any()
    assert not far_out(np.asarray([0.0] * 9 + [100.0] * 3), "seconds")[0].any()
    assert not far_out(np.asarray([0.1] * 9 + [50.0]), "seconds")[0].any()


def test_sources_without_weights_are_told_their_shares(make, caplog):
    make([row()] * 6, [row()] * 2)
    (message,) = [m for m in caplog.messages if "without weights" in m]
    assert "m0.jsonl 75.0%" in message and "m1.jsonl 25.0%" in message and "weight: 1" in message
    caplog.clear()
    make([row()] * 6)
    make([row()] * 6, [row()] * 2, entry={"weight": 1})
    make([row()] * 6, [row()] * 2, which="validation_ds")
    assert "without weights" not in caplog.text


def conversations(*speakers):
    clip = AudioClip(id="a", path="", duration_s=1.0)
    turns = [SpokenTurn(speaker=s, start_s=0.0, end_s=1.0, text="x") for s in speakers]
    return [
        DuplexConversation(
            id="c", duration_s=1.0, sample_rate_hz=1, source=clip, target=clip, turns=tuple(turns)
        )
    ]


def test_turns_of_other_speakers_are_left_out_with_a_warning(caplog):
    turns = conversations(*["user", "agent"] * 19, "Agnet")
    check_roles(turns, ("user",), ("agent",), "data.train_ds")
    assert "'Agnet' (1 turns)" in caplog.text and "did you mean 'agent'?" in caplog.text
    assert "left out" in caplog.text
    caplog.clear()
    check_roles(conversations("agent"), ("user",), ("agent",), "data.train_ds")
    assert not caplog.text


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        (["user", "agent"] * 4 + ["x"], "remove their supervisions"),
        (["user"] * 20 + ["Agent"], "data.output_roles matches no speaker"),
        (["agent"] * 20 + [None], "data.input_roles matches no speaker"),
    ],
)
def test_too_many_turns_of_other_speakers_are_refused(speakers, message):
    with pytest.raises(SettingsError, match=message):
        check_roles(conversations(*speakers), ("user",), ("agent",), "data.train_ds")
