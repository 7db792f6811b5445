"""Inputs at addresses give the utterances that local ones give."""

import json

import fsspec
import numpy as np
import pytest

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.duplex.inputs import read_dialogues
from speechlm2_jax.evaluation.inputs import read_inputs
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.http_server import serving

RATE_HZ = 16_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["http", "memory"])
def storage(request):
    """The address of a folder, and what puts bytes there."""
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        if files.exists("/inputs"):
            files.rm("/inputs", recursive=True)
        yield "memory://inputs", lambda name, data: files.pipe(f"/inputs/{name}", data)
        return
    with serving() as site:
        yield site.url, site.put


@pytest.fixture
def waves(storage, wav):
    """Two recordings in a folder."""
    _, put = storage
    for name, seconds in (("a", 1.0), ("b", 0.5)):
        with open(wav(f"{name}.wav", seconds), "rb") as file:
            put(f"set/{name}.wav", file.read())


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_manifests_lists_and_patterns_of_shards(storage, waves):
    folder, put = storage
    for n, name in enumerate("ab"):
        row = {"audio_filepath": f"set/{name}.wav", "duration": 1.0 - n / 2, "text": name}
        put(f"m{n}.jsonl", lines(row))
    dialog = {"conversations": [{"from": "User", "type": "text", "value": "Hello?"}]}
    put("dialogs.json", lines(dialog))
    found = read_inputs([f"{folder}/m{{0..1}}.jsonl", f"{folder}/dialogs.json"])
    assert [u.text for u in found] == ["a", "b", None]
    assert [len(u.read(RATE_HZ)) for u in found[:2]] == [16_000, 8_000]
    assert found[2].dialog.messages("x") == [("user", "Hello?")]
    (same,) = read_inputs(f"{folder}/m1.jsonl")
    np.testing.assert_array_equal(same.read(RATE_HZ), found[1].read(RATE_HZ))


def test_recordings_and_folders_of_them(storage, waves):
    folder, put = storage
    (one,) = read_inputs(f"{folder}/set/a.wav")
    assert (one.id, one.text) == ("a.wav", None)
    assert one.read(RATE_HZ).shape == (16_000,)
    (dialogue,) = read_dialogues([f"{folder}/set/b.wav"], None)
    assert dialogue.set_name == "b"
    if folder.startswith("http"):
        with pytest.raises(SettingsError, match="inputs: .*a web server does not list its files"):
            read_inputs(f"{folder}/set")
        return
    put("set/notes.txt", b"no audio")
    assert [u.id for u in read_inputs(f"{folder}/set")] == ["a.wav", "b.wav"]


def test_a_file_of_entries(storage, waves):
    folder, put = storage
    put("m.jsonl", lines({"audio_filepath": "set/a.wav", "duration": 1.0, "text": "a"}))
    put("entries.yaml", f"- manifest_filepath: {folder}/m.jsonl\n".encode())
    (found,) = read_inputs(f"{folder}/entries.yaml")
    assert found.text == "a" and len(found.read(RATE_HZ)) == 16_000


def test_what_is_not_there_is_one_line(storage):
    folder, put = storage
    for name in ("nothing.jsonl", "nothing.yaml"):
        with pytest.raises(SettingsError, match=f"^inputs: .*{name}.*(no such file|404)"):
            read_inputs(f"{folder}/{name}")
    (lost,) = read_inputs(f"{folder}/nothing.wav")  # told when its turn comes
    with pytest.raises(AudioError) as caught:
        lost.read(RATE_HZ)
    assert caught.value.cause == "missing"
    put("list.json", b"[1]")
    with pytest.raises(SettingsError, match="^inputs: .*is a JSON list, not JSON lines"):
        read_inputs(f"{folder}/list.json")
