"""Remote tars that are replaced while a run reads them."""

import json

import fsspec
import pytest

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.storage.access import StorageAccess
from speechlm2_jax.data.storage.filesystems import version_of
from speechlm2_jax.data.streams.feed import blocks_of
from tests.data_pipeline.http_server import serving
from tests.data_pipeline.small_corpus import read_input_cfg, wav_bytes, write_tar

RATE = 16000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put_in_memory(name, data):
    fsspec.filesystem("memory").pipe(f"/versions/{name}", data)


@pytest.fixture(params=["http", "memory"])
def storage(request):
    """The address of an empty folder, and what puts files there."""
    if request.param == "memory":
        yield "memory://versions", put_in_memory
        return
    with serving() as site:
        yield site.url, site.put


def put_tar(put, tmp_path, level):
    """A tar of two recordings, whose bytes depend on the level alone."""
    path = tmp_path / "made.tar"
    write_tar(path, [(name, wav_bytes(0.5, level)) for name in ("a.wav", "b.wav")])
    put("audio.tar", path.read_bytes())


def read(folder):
    (source,) = read_input_cfg(
        {
            "type": "nemo_tarred",
            "manifest_filepath": f"{folder}/manifest.jsonl",
            "tarred_audio_filepaths": f"{folder}/audio.tar",
        }
    )
    return source.conversations[0].clips[0]


def test_a_remote_tar_replaced_by_one_of_the_same_sizes_is_noticed(
    storage, tmp_path, monkeypatch, caplog
):
    folder, put = storage
    rows = [{"audio_filepath": f"{n}.wav", "duration": 0.5, "text": n} for n in "ab"]
    put("manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    put_tar(put, tmp_path, 0.1)
    clip = read(folder)
    assert round(float(clip.load(RATE)[0]), 1) == 0.1
    put_tar(put, tmp_path, 0.9)
    monkeypatch.setattr("speechlm2_jax.data.storage.versions.EVERY_S", 0.0)
    for _ in range(2):
        with pytest.raises(AudioError, match=r"audio\.tar: changed since its members") as caught:
            clip.load(RATE)
        assert caught.value.cause == "changed"
    assert caplog.text.count("changed since this run read it") == 1
    again = read(folder)  # a new start
    assert round(float(again.load(RATE)[0]), 1) == 0.9


def test_a_stream_tells_of_a_tar_that_was_replaced(storage, tmp_path, caplog):
    folder, put = storage
    put_tar(put, tmp_path, 0.2)
    tar, access = f"{folder}/audio.tar", StorageAccess()
    before = b"".join(blocks_of(tar, 0, access))
    assert b"".join(blocks_of(tar, 0, access)) == before and "changed" not in caplog.text
    put_tar(put, tmp_path, 0.8)
    after = b"".join(blocks_of(tar, 0, access))
    assert len(after) == len(before) and after != before
    assert caplog.text.count("audio.tar: changed since this run read it") == 1


@pytest.mark.parametrize(
    ("info", "is_known"),
    [
        ({"name": "a", "size": 3, "type": "file"}, False),
        ({"name": "a", "size": 3, "type": "file", "atime": 5.0, "generation": None}, False),
        ({"name": "a", "size": 3, "type": "file", "modify": "20260101"}, True),
        ({"name": "a", "size": 3, "ETag": '"x"', "LastModified": "today"}, True),
    ],
)
def test_what_a_library_tells_of_a_file_makes_its_version(info, is_known):
    assert bool(version_of(info)) is is_known
    assert version_of({**info, "size": 4, "atime": 6.0}) == version_of(info)
