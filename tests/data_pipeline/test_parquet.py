"""Parquet files, and folders of Hugging Face data sets: texts at start-up, recordings in place."""

import builtins

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from speechlm2_jax.data.audio import AudioError
from tests.data_pipeline.small_corpus import read_input_cfg, refusal, turns, wav_bytes

RATE = 16000


def table(*names, first=0, **columns):
    audio = [
        {"bytes": wav_bytes(0.25, 0.1 * (first + n + 1)), "path": f"{n}.wav"} for n in range(3)
    ]
    return pyarrow.table(
        {"audio": audio, "text": [f"text {first + n}" for n in range(3)], **columns}
    ).select(list(names) or ["audio", "text", *columns])


def write(path, made, group=2):
    path.parent.mkdir(exist_ok=True, parents=True)
    parquet.write_table(made, path, row_group_size=group)
    return str(path)


def entry(path, **more):
    return {"type": "parquet", "manifest_filepath": str(path), **more}


def read(*args, **more):
    (source,) = read_input_cfg(entry(*args, **more))
    assert source.is_endless
    return source.conversations


def assert_three(found, first=0):
    assert [c.response for c in found] == [f"text {first + n}" for n in range(3)]
    for n, one in enumerate(found):
        (clip,) = one.clips
        assert clip.duration_s == 0.25
        wave = clip.load(RATE)
        assert len(wave) == 4000
        np.testing.assert_allclose(wave, 0.1 * (first + n + 1), atol=1e-4)


def test_rows_are_recordings_with_their_texts(tmp_path):
    found = read(write(tmp_path / "m.parquet", table(context=["a", "b", None])))
    assert_three(found)
    assert [c.id for c in found] == ["m_0", "m_1", "m_2"]
    assert turns(found[0]) == [("user", "a"), ("user", "m_0"), ("assistant", "text 0")]
    assert len(found[2].turns) == 2


def test_columns_may_have_other_names_and_bytes_may_be_bare(tmp_path, monkeypatch):
    bare = pyarrow.table(
        {
            "sound": [wav_bytes(0.25, 0.1 * (n + 1)) for n in range(3)],
            "words": [f"text {n}" for n in range(3)],
            "secs": [0.25] * 3,
            "id": [7, 8, 9],
        }
    )
    path = write(tmp_path / "m.parquet", bare)
    names = {"audio_field": "sound", "text_field": "words", "duration_field": "secs"}
    with monkeypatch.context() as patched:
        patched.setattr("speechlm2_jax.data.parquet.cell_bytes", None)  # nothing opens a recording
        found = read(path, **names, lang_field="l", sampling_rate=8000)
    assert [c.id for c in found] == ["7", "8", "9"]
    assert_three(found)
    assert "no column 'audio'; set audio_field: NAME (columns: 'sound, words" in refusal(
        entry(path)
    )
    del names["text_field"]
    assert "no column 'text'; set text_field: " in refusal(entry(path, **names))


def test_folders_of_the_hub_have_one_split_or_name_its_files(tmp_path):
    data = tmp_path / "set" / "data"
    for shard in range(2):
        write(data / f"train-{shard:05d}-of-00002.parquet", table(first=3 * shard))
    found = read(tmp_path / "set")
    assert_three(found[:3]), assert_three(found[3:], first=3)
    write(data / "test-00000-of-00001.parquet", table())
    message = refusal(entry(tmp_path / "set"))
    assert "has the splits test, train; name the files of one, for instance" in message
    assert len(read(f"{data}/train-{{00000..00001}}-of-00002.parquet")) == 6


def save_to_disk(path, made, options=None):
    path.parent.mkdir(exist_ok=True, parents=True)
    with pyarrow.ipc.new_stream(str(path), made.schema, options=options) as stream:
        stream.write_table(made, max_chunksize=2)


def test_data_sets_saved_to_disk_are_read_at_random_without_pyarrow(tmp_path):
    save_to_disk(tmp_path / "data-00000-of-00001.arrow", table())
    found = read(tmp_path)
    assert all(c.clips[0].byte_range is not None for c in found)
    assert_three(found)
    audio = [{"bytes": None, "path": "a.wav"}]
    made = pyarrow.table({"audio": audio, "text": ["x"], "duration": [0.25]})
    save_to_disk(tmp_path / "data-00000-of-00001.arrow", made)
    (tmp_path / "a.wav").write_bytes(wav_bytes(0.25))
    (one,) = read(tmp_path)
    assert len(one.clips[0].load(RATE)) == 4000
    made = pyarrow.table({"audio": [{"bytes": None, "path": None}], "text": ["x"]})
    save_to_disk(tmp_path / "data-00000-of-00001.arrow", made)
    assert "row 0: audio has neither bytes nor a path" in refusal(entry(tmp_path))
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    save_to_disk(tmp_path / "data-00000-of-00001.arrow", table(), options)
    assert "save it without compression" in refusal(entry(tmp_path))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(b"neither" * 100)
    assert f"{path}: not {suffix.title()}, or damaged" in refusal(entry(path))
    (tmp_path / "empty").mkdir()
    assert "neither .parquet nor .arrow files" in refusal(entry(tmp_path / "empty"))


def test_a_recording_that_is_missing_or_broken_is_masked_when_its_turn_comes(tmp_path):
    audio = [{"bytes": wav_bytes(0.25)}, {"bytes": None}, {"bytes": b"no audio" * 99}]
    made = pyarrow.table({"audio": audio, "text": ["a", "b", "c"], "duration": [0.25] * 3})
    causes = []
    for one in read(write(tmp_path / "m.parquet", made)):
        try:
            causes.append(len(one.clips[0].load(RATE)))
        except AudioError as error:
            causes.append(error.cause)
    assert causes == [4000, "empty", "unreadable"]


def test_without_pyarrow_the_line_tells_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'speechlm2_jax[parquet]'" in refusal(entry(tmp_path))
