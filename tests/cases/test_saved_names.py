"""A saved directory names its sources as the user did, and loads wherever it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import speechlm2_jax as slm

DATA = Path(__file__).resolve().parents[1] / "data"


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def settings(**changes: object) -> dict:
    cfg = json.loads((DATA / "salm/llama_adapter.json").read_text())["cfg_in"]
    return {**cfg, "pretrained_llm": "parts/llama", "pretrained_asr": "parts/asr.nemo", **changes}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(DATA / "llm/llama", home / "parts/llama")
    shutil.copy(DATA / "salm/asr.nemo", home / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        model = slm.models.SALM(settings())
        model.save_pretrained("first")
    shutil.move(home / "first", tmp_path_factory.mktemp("elsewhere") / "first")
    moved = next(tmp_path_factory.getbasetemp().glob("elsewhere*/first"))
    shutil.rmtree(home)
    return moved, model


def test_a_directory_loads_where_its_sources_are_not(saved, tmp_path, monkeypatch):
    folder, model = saved
    monkeypatch.chdir(tmp_path)
    loaded = slm.models.SALM.from_pretrained(folder)
    assert loaded.variables.keys() == model.variables.keys()
    for path, value in loaded.variables.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(model.variables[path]))
    assert len(loaded.tokenizer) == len(model.tokenizer)


def test_config_names_what_the_user_gave_however_often_it_is_saved(saved, tmp_path):
    folder, _ = saved
    before = config(folder)
    assert before["pretrained_llm"] == "parts/llama"
    assert before["pretrained_asr"] == "parts/asr.nemo"
    model = slm.models.SALM.from_pretrained(folder).astype("bfloat16")
    model.save_pretrained(tmp_path / "second")
    model.save_definition(tmp_path / "third")
    for name in ("second", "third"):
        text = (tmp_path / name / "config.json").read_text()
        assert json.loads(text) == before
        assert str(folder.parent) not in text and str(tmp_path) not in text


def test_a_duplex_model_names_its_codec_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(DATA / "duplex")
    model = slm.models.DuplexS2SModel.from_pretrained("duplex_s2s/hf")
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    original = config(DATA / "duplex/duplex_s2s/hf")
    again = slm.models.DuplexS2SModel.from_pretrained("saved")
    again.save_pretrained("again")
    for name in ("saved", "again"):
        made = config(tmp_path / name)
        for key in ("pretrained_llm", "pretrained_audio_codec", "pretrained_asr"):
            assert made.get(key) == original.get(key), key
    assert (tmp_path / "again/audio_codec/config.json").is_file()
