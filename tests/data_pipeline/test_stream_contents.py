"""Streams that are resumed tell of shards and settings that changed while the run was stopped."""

import logging

import pytest

from speechlm2_jax.data import DataModule
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar

CHANGED = "the rows, tars or settings of the stream changed since this state was saved"


def write_shard(folder, number, text="yes", seconds=0.2):
    names = [f"s{number}m{n}.wav" for n in range(3)]
    write_tar(folder / f"audio_{number}.tar", [(name, wav_bytes(seconds)) for name in names])
    rows = [{"audio_filepath": name, "duration": 0.2, "text": text} for name in names]
    write_lines(folder / f"manifest_{number}.jsonl", *rows)


@pytest.fixture
def stream_of(tmp_path, tokenizer):
    """Makes the training batches of two shards."""
    for number in range(2):
        write_shard(tmp_path, number)
    opened = []

    def make(state=None, tags=None, **settings):
        entry = {
            "type": "nemo_tarred",
            "manifest_filepath": f"{tmp_path}/manifest_{{0..1}}.jsonl",
            "tarred_audio_filepaths": f"{tmp_path}/audio_{{0..1}}.tar",
            "audio_locator_tag": TAG,
            **({"tags": tags} if tags else {}),
        }
        common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2}
        train = {**common, "stream": True, "input_cfg": [entry], **settings}
        module = DataModule({"train_ds": train}, tokenizer)
        module.setup(frame_count=frames)
        opened.append(module.train_batches(state))
        return opened[-1]

    yield make
    for stream in opened:
        stream.close()


@pytest.fixture
def state(stream_of):
    """That of a run after two batches."""
    stream = stream_of()
    next(stream)
    next(stream)
    return stream.get_state()


def text_of_a_row(folder):
    write_shard(folder, 1, text="no!")  # as long


def a_longer_tar(folder):
    path = folder / "audio_0.tar"
    path.write_bytes(path.read_bytes() + bytes(10240))


@pytest.mark.parametrize("change", [text_of_a_row, a_longer_tar])
def test_changed_shards_are_told(stream_of, state, tmp_path, caplog, change):
    change(tmp_path)
    stream_of(state)
    assert caplog.text.count(CHANGED) == 1


@pytest.mark.parametrize(
    "settings", [{"max_duration": 9.0}, {"perturb_volume": True}, {"tags": {"lang": "en"}}]
)
def test_changed_settings_are_told(stream_of, state, caplog, settings):
    stream_of(state, **settings)
    assert caplog.text.count(CHANGED) == 1


def test_what_changes_no_example_is_not_told(stream_of, state, tmp_path, caplog):
    for path in sorted(tmp_path.glob("*.*")):
        path.write_bytes(path.read_bytes())  # a copy has another time
    caplog.set_level(logging.WARNING)
    stream_of(state, num_workers=3, read_timeout=60.0, max_error_rate=0.5)
    older = {**state, "contents": ""}
    stream_of(older, max_duration=9.0)
    assert "changed since this state" not in caplog.text
