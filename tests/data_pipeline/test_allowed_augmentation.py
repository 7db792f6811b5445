"""What `allowed_roots` leaves out is not even looked for: noise, responses, files of entries."""

import json
import os

import pytest

from speechlm2_jax.data.augmentation import reverberation
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import refusal, write_lines


@pytest.fixture
def looked_for(monkeypatch):
    """The paths that are looked for from now on."""
    found = []

    def seen(name):
        original = getattr(os.path, name)

        def look(path, *more):
            found.append(str(path))
            return original(path, *more)

        monkeypatch.setattr(os.path, name, look)

    for name in ("isfile", "isdir", "exists"):
        seen(name)
    return found


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    "keys",
    [
        {"rir_enabled": True, "rir_path": "SECRET/x.jsonl"},
        {"rir_enabled": True, "rir_path": "file://SECRET/x.jsonl"},
        {"noise_path": "SECRET/x.jsonl"},
        {"noise_path": "SECRET"},
        {"noise_path": {"manifest_filepath": "SECRET/x.jsonl"}},
        {"noise_path": "SECRET/x.yaml"},
    ],
)
def test_paths_of_augmentation_are_checked_before_they_are_looked_for(
    corpus, make_module, tmp_path, looked_for, keys, is_there
):
    secret = tmp_path / "secret"
    secret.mkdir()
    if is_there:
        for name in ("x.jsonl", "x.yaml"):
            (secret / name).write_text("{}")
    keys = json.loads(json.dumps(keys).replace("SECRET", str(secret)))
    with pytest.raises(SettingsError, match="lies in none of allowed_roots"):
        make_module(corpus / "manifest.jsonl", allowed_roots=[str(corpus)], **keys)
    assert not [path for path in looked_for if str(secret) in path]


def test_relative_names_and_files_of_entries_are_not_looked_for_either(tmp_path, looked_for):
    (tmp_path / "data").mkdir()
    row = {"audio_filepath": "../secret/a.wav", "duration": 1.0, "text": "x", "sampling_rate": 1}
    manifest = write_lines(tmp_path / "data" / "m.jsonl", row)
    allowed = {"allowed_roots": [str(tmp_path / "data")]}
    assert "allowed_roots" in refusal({"manifest_filepath": manifest}, **allowed)
    nested = [{"type": "group", "input_cfg": f"{tmp_path}/secret/x.yaml"}]
    assert "allowed_roots" in refusal(*nested, **allowed)
    assert not [path for path in looked_for if "secret" in path]


@pytest.mark.parametrize("kind", ["command", "url"])
def test_impulse_responses_of_commands_are_refused(tmp_path, kind):
    source = {"type": kind, "channels": [0], "source": f"touch {tmp_path}/ran"}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 8000}
    path = write_lines(tmp_path / "r.jsonl", {**recording, "duration": 0.5, "channel_ids": [0]})
    with using(StorageAccess()), pytest.raises(SettingsError, match=f"r is read from a {kind}"):
        reverberation.read_responses(path)
    assert not (tmp_path / "ran").exists()
