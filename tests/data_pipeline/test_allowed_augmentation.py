"""What `allowed_roots` leaves out is not even looked for: noise, responses, files of entries.

Nor what an index names that was built when more was allowed.
"""

import json
import os
import shutil
from itertools import islice

import pytest

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.augmentation import reverberation
from speechlm2_jax.data.index import row_count
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import TAG, frames, refusal, write_lines, write_manifest


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


@pytest.mark.parametrize("first_rows", [512, 1])
def test_an_index_of_an_earlier_run_allows_nothing(
    tmp_path, corpus, tokenizer, monkeypatch, caplog, first_rows
):
    monkeypatch.setattr(row_count, "LARGE_ROWS", 1)
    monkeypatch.setattr("speechlm2_jax.data.index.rows._FIRST_ROWS", first_rows)
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(corpus / "clip00.wav", inside)
    names = [inside / "clip00.wav", corpus / "clip01.wav"]
    rows = [{"audio_filepath": str(name), "text": "x"} for name in names * 4]
    write_manifest(inside / "m.jsonl", rows)

    def module(**keys):
        made = DataModule({"train_ds": {**train, **keys}}, tokenizer, SALMDataset(tokenizer))
        made.setup(frame_count=frames)
        return made

    train = {"manifest_filepath": str(inside / "m.jsonl"), "audio_locator_tag": TAG}
    train |= {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2}
    module()  # builds the index
    if first_rows > 1:
        with pytest.raises(SettingsError, match=r"m\.jsonl line 2: .*in none of allowed_roots"):
            module(allowed_roots=[str(inside)])
        return
    restricted = module(allowed_roots=[str(inside)])
    list(islice(restricted.train_batches(), 4))
    assert set(restricted.dropped) == {"not_allowed"} and "changed" not in caplog.text
