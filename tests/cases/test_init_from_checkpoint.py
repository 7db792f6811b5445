"""`model.init_from_checkpoint`: weights of one's own model, wherever it lies, in a fresh model."""

import json
import logging
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import speechlm2_jax as slm
from speechlm2_jax import experiment
from speechlm2_jax.checkpointing import Checkpointer, Retention, write_checksums
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.settings import SettingsError

DATA = Path(__file__).resolve().parents[1] / "data"
SALM = slm.models.SALM


def settings(name: str = "llama_adapter", **changes: object) -> dict:
    cfg = json.loads((DATA / f"salm/{name}.json").read_text())["cfg_in"]
    llm = str(DATA / "llm" / Path(cfg["pretrained_llm"]).name)
    return {**cfg, "pretrained_llm": llm, "pretrained_asr": str(DATA / "salm/asr.nemo"), **changes}


def deeper(layers: int) -> dict:
    """The settings with another number of layers in the modality adapter."""
    perception = settings()["perception"]
    adapter = {**perception["modality_adapter"], "n_layers": layers}
    return {**perception, "modality_adapter": adapter}


def assert_same(ours, theirs, paths=None) -> None:
    for path in paths or theirs.keys():
        np.testing.assert_array_equal(
            np.asarray(ours[path], np.float32), np.asarray(theirs[path], np.float32), err_msg=path
        )


@pytest.fixture(scope="module")
def trained():
    """A model that no other start gives."""
    model = SALM(settings(seed=5))
    model.variables = {
        path: value * 2 if np.issubdtype(np.asarray(value).dtype, np.floating) else value
        for path, value in model.variables.items()
    }
    return model


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    trained.save_pretrained(folder)
    return folder


def run_of(model, folder: Path) -> Path:
    """A run directory with one step of a model's weights, frozen ones in bfloat16."""
    checkpointer = Checkpointer(folder / "checkpoints", Retention())
    values = {path: jnp.asarray(value) for path, value in model.variables.items()}
    frozen = {p: v for p, v in values.items() if p.startswith("llm.")}
    checkpointer.save_frozen(frozen)
    items = {"params": {p: v for p, v in values.items() if p not in frozen}}
    arrays = {**items, "buffers": {}, "opt": {}}
    checkpointer.save(3, arrays, progress={"step": 3}, settings=model.settings)
    checkpointer.close()
    model.save_definition(folder / "model")
    write_checksums(folder / "model", {})
    return folder


@pytest.mark.parametrize("kind", ["saved", "file", "run", "step"])
def test_a_fresh_model_has_the_weights(kind, saved, trained, tmp_path):
    if kind in ("run", "step"):
        run = run_of(trained, tmp_path / "run")
        path = run if kind == "run" else run / "checkpoints/3"
    else:
        path = saved if kind == "saved" else saved / "model.safetensors"
    model = SALM(settings(seed=1, init_from_checkpoint=str(path)))
    model.check_weights()
    assert_same(model.variables, trained.variables)
    assert any(str(path) in note for note in model.notes)


def test_a_lightning_checkpoint_of_nemo_gives_its_weights(monkeypatch):
    monkeypatch.chdir(DATA / "salm")
    expected = SALM.from_pretrained("qwen3_lora.ckpt")
    model = SALM(settings("qwen3_lora", init_from_checkpoint="qwen3_lora.ckpt"))
    assert_same(model.variables, expected.variables)


def test_names_are_looked_up_beside_the_yaml_and_null_is_nothing(saved, trained):
    near = SALM(settings(init_from_checkpoint="model"), near=(saved.parent,))
    assert_same(near.variables, trained.variables)
    plain = SALM(settings(init_from_checkpoint=None))
    assert_same(plain.variables, SALM(settings()).variables)


def test_weights_are_streamed_to_where_they_belong(saved, trained):
    from speechlm2_jax.strategies import ModelParallelStrategy
    from speechlm2_jax.training.run.preparation import Setup
    from speechlm2_jax.training.trainer_config import TrainerConfig

    model = SALM(settings(init_from_checkpoint=str(saved), perception=deeper(3)))
    strategy = ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=2)
    setup = Setup.of(model, TrainerConfig(accelerator="cpu", precision="32-true"), strategy)
    placed = model.load_onto(setup.layout.variables)
    assert all(value.sharding == setup.layout.variables[p].sharding for p, value in placed.items())
    assert_same(placed, model.variables)


def test_what_a_checkpoint_lacks_starts_as_without_it_and_is_named(saved, trained, caplog):
    with caplog.at_level(logging.INFO):
        model = SALM(settings(seed=1, init_from_checkpoint=str(saved), perception=deeper(3)))
        made, start = model.variables, SALM(settings(seed=1, perception=deeper(3))).variables
    stacks = [p for p in made if made[p].shape != trained.variables[p].shape]
    assert len(stacks) == 40
    for name in stacks:
        assert_same({0: made[name][:2]}, {0: trained.variables[name]})
        assert_same({0: made[name][2]}, {0: start[name][2]})
    assert_same(made, trained.variables, set(made) - set(stacks))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("lacks" in w and "modality_adapter.layers.2." in w for w in warnings)


def test_what_the_model_has_no_place_for_is_named(saved, trained, caplog):
    with caplog.at_level(logging.INFO):
        model = SALM(settings(init_from_checkpoint=str(saved), perception=deeper(1)))
        made = model.variables
    stacks = [p for p in made if made[p].shape != trained.variables[p].shape]
    assert len(stacks) == 40
    for name in stacks:
        assert_same({0: made[name]}, {0: trained.variables[name][:1]})
    text = caplog.text
    assert "not used" in text and "modality_adapter.layers.1." in text


def test_adapters_come_and_go(saved, trained, tmp_path, caplog):
    adapted = SALM(settings(init_from_checkpoint=str(saved), lora={"r": 2}))
    plain = {path for path in adapted.variables if not path.endswith(("lora_a", "lora_b"))}
    assert_same(adapted.variables, trained.variables, plain)
    adapted.save_pretrained(tmp_path / "adapted")
    back = SALM(settings(init_from_checkpoint=str(tmp_path / "adapted")))
    assert_same(back.variables, trained.variables)
    assert "lora_A" in caplog.text and "not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("asr/ctc.nemo", "an ASR model.*model.pretrained_asr"),
        ("codec/lfr22_tiny.nemo", "an audio codec.*model.pretrained_audio_codec"),
        ("llm/llama", "a Hugging Face LLM.*model.pretrained_llm"),
        ("nowhere/at/all", "no such file or directory"),
    ],
)
def test_what_belongs_to_another_key_is_sent_there(name, match):
    model = SALM(settings(init_from_checkpoint=str(DATA / name)))
    with pytest.raises(SettingsError, match=f"model.init_from_checkpoint: .*{match}"):
        model.check_weights()


def test_a_file_of_which_nothing_fits_is_refused(tmp_path):
    shutil.copy(DATA / "codec/layers.safetensors", tmp_path / "model.safetensors")
    model = SALM(settings(init_from_checkpoint=str(tmp_path / "model.safetensors")))
    for start in (model.check_weights, lambda: model.variables):
        with pytest.raises(ConversionError, match="init_from_checkpoint: none of the"):
            start()


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    model = SALM(settings(init_from_checkpoint=str(tmp_path)))
    with pytest.raises(SettingsError, match="without a checkpoint"):
        model.check_weights()


def test_what_was_saved_does_not_look_for_where_it_started(saved, trained, tmp_path):
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    model = SALM(settings(init_from_checkpoint=str(source)))
    run = run_of(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "again")
    shutil.rmtree(source)
    for folder in (run, tmp_path / "again"):
        assert_same(SALM.from_pretrained(folder).variables, trained.variables)
    assert "init_from_checkpoint" not in json.loads((tmp_path / "again/config.json").read_text())


def test_a_run_does_not_start_from_itself(tmp_path):
    (tmp_path / "checkpoints/5/params").mkdir(parents=True)
    settings_of_run = {
        "model": {"init_from_checkpoint": str(tmp_path / "x/..")},
        "exp_manager": {"explicit_log_dir": str(tmp_path)},
    }
    (tmp_path / "x").mkdir()
    with pytest.raises(SettingsError, match="this very run.*explicit_log_dir"):
        experiment.check_start(settings_of_run)
    experiment.check_start({**settings_of_run, "exp_manager": {"explicit_log_dir": "elsewhere"}})


def test_a_duplex_model_starts_from_a_lightning_checkpoint(monkeypatch):
    monkeypatch.chdir(DATA / "duplex")
    cfg = json.loads((DATA / "duplex/duplex_s2s/cfg_input.json").read_text())
    expected = slm.models.DuplexS2SModel.from_pretrained("duplex_s2s/step2_weights_only.ckpt")
    source = "duplex_s2s/step2_weights_only.ckpt"
    model = slm.models.DuplexS2SModel({**cfg, "init_from_checkpoint": source})
    assert_same(model.variables, expected.variables)
