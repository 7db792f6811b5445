"""What of a test set the training had: texts as they are scored, stretches, copies of files."""

import shutil
from dataclasses import replace

import pytest

from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.evaluation import training_data
from speechlm2_jax.evaluation.run_directories import read_run
from speechlm2_jax.evaluation.training_data import TrainingData
from tests.evaluation.page_case import utterance
from tests.evaluation.run_case import make_run, write_manifest


@pytest.fixture
def training(wav, tmp_path):
    """Two rows of training: a whole file, and a stretch of another."""
    wav("one.wav", 1.0)
    wav("long.wav", 9.0)
    rows = [
        {"audio_filepath": "one.wav", "duration": 1.0, "text": "Yes  please"},
        {"audio_filepath": "long.wav", "duration": 2.0, "offset": 3.0, "text": "no"},
    ]
    found = TrainingData(str.lower)
    found.add(write_manifest(tmp_path / "train.jsonl", rows))
    return found


def _clip(path, duration_s=1.0, **fields):
    return AudioClip(id="x", path=str(path), duration_s=duration_s, is_segment=False, **fields)


def test_texts_are_compared_as_they_are_scored(training):
    assert training.has_text("yes PLEASE ")
    assert not training.has_text("yes")
    assert not training.has_text("")
    assert not training.has_text(None)


def test_a_copy_of_a_file_is_found_and_another_file_of_its_length_is_not(training, tmp_path):
    copy = shutil.copy(tmp_path / "one.wav", tmp_path / "copy.wav")
    assert training.has_recording(_clip(copy, 1.004)), "lengths are rounded"
    data = bytearray((tmp_path / "one.wav").read_bytes())
    data[-1] ^= 1
    (tmp_path / "other.wav").write_bytes(data)
    assert not training.has_recording(_clip(tmp_path / "other.wav"))
    assert not training.has_recording(_clip(tmp_path / "missing.wav"))


def test_a_stretch_is_another_recording_than_its_file(training, tmp_path):
    long = _clip(tmp_path / "long.wav", 2.0, offset_s=3.0)
    assert training.has_recording(replace(long, is_segment=True))
    assert not training.has_recording(replace(long, is_segment=True, offset_s=5.0))
    assert not training.has_recording(_clip(tmp_path / "long.wav", 9.0))


def test_only_files_of_equal_size_are_read(training, wav, monkeypatch):
    read = []
    monkeypatch.setattr(training_data, "_digest", read.append)
    assert not training.has_recording(_clip(wav("other.wav", 1.5), 1.0))
    assert read == []


def test_utterances_are_marked(training, tmp_path):
    seen = utterance("a", 1.0, "no", clip=_clip(tmp_path / "one.wav"))
    new = utterance("b", 1.0, "maybe", clip=_clip(tmp_path / "b.wav"), is_unseen=True)
    found = training.marked([seen, new])
    assert [(u.is_seen_text, u.is_seen_audio) for u in found] == [(True, True), (False, False)]
    assert [u.is_unseen for u in found] == [False, True], "the training names no voice"


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_data, "MAX_LISTED_BYTES", 200)
    write_manifest(tmp_path / "large.jsonl", [{"text": "a" * 200}])
    (tmp_path / "bad.jsonl").write_text("{}\n")
    write_manifest(tmp_path / "good.jsonl", [{"text": "a"}])
    names = ["large.jsonl", "bad.jsonl", "good.jsonl", "gone.jsonl"]
    sources = [{"type": "nemo", "manifest_filepath": names}, {"type": "lhotse_shar"}]
    settings = {"data": {"train_ds": {"input_cfg": [{"type": "group", "input_cfg": sources}]}}}
    run = read_run(make_run(tmp_path / "run", settings=settings))
    assert run is not None
    found = run.training_data(str)
    assert (found.rows, found.texts) == (1, {"a"})
    expected = ["large.jsonl", "bad.jsonl", "gone.jsonl", "a source of type lhotse_shar"]
    assert [name.rpartition("/")[2] for name in found.unread] == expected
