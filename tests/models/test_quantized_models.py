"""Models with a quantized LLM: loaded, sharded, generating, trained over, saved."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from speechlm2_jax import experiment
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.quantizing import dequantized
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.devices import load
from speechlm2_jax.inference import meshes
from speechlm2_jax.layers.quantized_layers import quantized_paths
from speechlm2_jax.models import SALM
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.state import Partition
from tests.evaluation.run_case import evaluate_on_one_device
from tests.training.tiny_salm import write_config

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
PLAIN, LORA = DATA / "salm" / "llama_adapter_hf", DATA / "salm" / "qwen3_lora_hf"
PROMPTS = [[{"role": "user", "content": text}] for text in ("What time is it?", "Yes", "No. Why?")]
ERROR = {"int8": 0.02, "fp8": 0.08}
"""Root mean square of the change of the logits, over that of the logits; measured 0.008 and 0.04
(weights), so that a change of the arithmetic shows."""


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(PLAIN)


@pytest.fixture(scope="module")
def int8():
    return SALM.from_pretrained(PLAIN, quantize="int8")


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def check_logits(small: SALM, model: SALM, folder: Path, bound: float) -> None:
    """What is quantized, what is left, and what the logits are."""
    weights = quantized_paths(small.infos)
    llm = {p: i for p, i in model.infos.items() if p.startswith("llm.")}
    assert set(weights) == {p for p in llm if p.endswith(".weight") and "norm" not in p}
    for path in weights:
        assert small.variables[path].nbytes * 4 == model.variables[path].nbytes
    for path in set(model.infos) - set(weights):
        np.testing.assert_array_equal(small.variables[path], model.variables[path])
    found, expected = small.probe()["logits"], model.probe()["logits"]
    assert 0 < error(found, expected) < bound
    plain = SALM.from_pretrained(folder)
    plain.variables = {p: jnp.asarray(v) for p, v in dequantized(small.variables).items()}
    np.testing.assert_allclose(found, plain.probe()["logits"], rtol=1e-4, atol=1e-4)


def test_logits_and_bytes(model, int8):
    check_logits(int8, model, PLAIN, ERROR["int8"])


@pytest.mark.slow  # variants: a program each
@pytest.mark.parametrize(("folder", "kind"), [(PLAIN, "fp8"), (LORA, "int8"), (LORA, "fp8")])
def test_logits_and_bytes_of_variants(folder, kind):
    small = SALM.from_pretrained(folder, quantize=kind)
    check_logits(small, SALM.from_pretrained(folder), folder, ERROR[kind])


def test_a_loaded_model_is_quantized_as_loading_does_it(int8):
    later = SALM.from_pretrained(PLAIN)
    assert later.variables and later.quantize("int8") is later
    assert later.infos == int8.infos
    jax.tree.map(np.testing.assert_array_equal, later.variables, int8.variables)


@pytest.mark.parametrize("strategy", [pytest.param("auto", marks=pytest.mark.slow), "fsdp"])
def test_weights_on_eight_devices_are_those_of_one(int8, strategy):
    many = SALM.from_pretrained(PLAIN, quantize="int8", strategy=strategy)
    assert many.variables.keys() == int8.variables.keys()
    for path, value in int8.variables.items():
        assert many.variables[path].dtype == value.dtype
        np.testing.assert_array_equal(many.variables[path], value, err_msg=path)
        assert len(many.variables[path].devices()) == 8
    weight = many.variables["llm.layers.attention.query.weight"]
    parts = 8 if strategy == "fsdp" else 1
    assert weight.addressable_shards[0].data.size == weight.size // parts


def test_auto_counts_the_bytes_of_quantized_weights(model, int8, monkeypatch):
    room = 1.01 * meshes.weight_bytes(int8.infos, "float32")
    assert room == pytest.approx(1.01 * sum(x.nbytes for x in int8.variables.values()))
    monkeypatch.setattr(meshes, "memory_bytes", lambda devices: room / meshes.WEIGHTS_SHARE)
    found = meshes.inference_sharding("auto", jax.devices(), int8.infos, "float32")
    assert found.tensor_size == 1
    plain = meshes.inference_sharding("auto", jax.devices(), model.infos, "float32")
    assert plain.tensor_size > 1


@pytest.mark.slow  # compiles two models for eight devices
@pytest.mark.parametrize("tensor", [1, 2])
def test_tokens_on_eight_devices_are_those_of_one(tensor):
    options = {"quantize": "int8", "kv_cache_dtype": "int8"}
    strategy = {"_target_": "ModelParallelStrategy", "tensor_parallel_size": tensor}
    alone = SALM.from_pretrained(PLAIN, **options).generate(PROMPTS, max_new_tokens=8)
    mesh = SALM.from_pretrained(PLAIN, strategy=strategy, **options)
    many = mesh.generate(PROMPTS, max_new_tokens=8)
    np.testing.assert_array_equal(many, alone)


@pytest.mark.slow  # several compilations
def test_every_way_to_generate_gives_the_same_tokens():
    """A batch, one by one, pieces, slots, beams of one, and drafts: one arithmetic."""
    model = SALM.from_pretrained(PLAIN, quantize="int8", kv_cache_dtype="int8")
    ids = model.generate(PROMPTS, max_new_tokens=8)[:, -8:]
    for number, prompt in enumerate(PROMPTS):
        one = model.generate([prompt], max_new_tokens=8)[0, -8:]
        np.testing.assert_array_equal(one, ids[number])
    slots = dict(sum(model.generate_each(PROMPTS, slots=2, max_new_tokens=8), []))
    for number, expected in enumerate(ids):
        np.testing.assert_array_equal(slots[number], expected[: len(slots[number])])
    drafts = [model.tokenizer.ids_to_text(row) for row in ids]
    for source in ({"drafts": drafts}, {"assistant_model": model}):
        drafted = model.generate(PROMPTS, max_new_tokens=8, **source)[:, -8:]
        np.testing.assert_array_equal(drafted, ids)


@pytest.mark.slow  # trained parts: a program of its own
def test_a_trained_llm_goes_on_with_the_same_words():
    settings = yaml.safe_load((ROOT / "configs" / "salm.yaml").read_text())["model"]
    parts = {
        key: str(ROOT / "configs" / settings[key]) for key in ("pretrained_llm", "pretrained_asr")
    }
    texts = ("turn off the radio", "Transcribe the following:", "what is the weather")
    prompts = [[{"role": "user", "content": text}] for text in texts]
    expected = SALM({**settings, **parts}).generate(prompts, max_new_tokens=12)
    small = SALM({**settings, **parts}).quantize("int8", "int8")
    np.testing.assert_array_equal(small.generate(prompts, max_new_tokens=12), expected)


def test_names_and_chips_that_do_not_fit_are_refused():
    with pytest.raises(SettingsError, match=r"^quantize: 'int4' is not supported; use int8 or fp8"):
        SALM.from_pretrained(PLAIN, quantize="int4")
    with pytest.raises(SettingsError, match=r"^kv_cache_dtype: 'bf16' is not supported"):
        SALM.from_pretrained(PLAIN, kv_cache_dtype="bf16")


def test_a_quantized_model_is_not_saved_as_what_it_is_not(int8, tmp_path):
    for save in (int8.save_pretrained, int8.save_llm):
        with pytest.raises(ConversionError, match="load it without quantize to save it"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_arguments_of_evaluate_reach_the_model():
    given = {}

    def from_pretrained(name, **options):
        given.update(options)
        return SimpleNamespace(mesh=None)

    config = EvalConfig(
        pretrained_name="m", inputs="x", device="cpu:0", quantize="int8", kv_cache_dtype="fp8"
    )
    try:
        load(config, from_pretrained)
    finally:
        jax.config.update("jax_default_device", None)
    assert given == {"dtype": "bfloat16", "quantize": "int8", "kv_cache_dtype": "fp8"}


def salm_settings(**changes: object) -> dict:
    cfg = json.loads((DATA / "salm" / "qwen3_lora.json").read_text())["cfg_in"]
    llm = str(DATA / "llm" / Path(cfg["pretrained_llm"]).name)
    return {**cfg, "pretrained_llm": llm, "pretrained_asr": str(DATA / "salm/asr.nemo"), **changes}


def test_only_a_frozen_llm_may_be_quantized_in_training():
    model = SALM(salm_settings(quantize_frozen_llm="int8"))
    partition = Partition.of(model.infos, model.trainable)
    small = {p for p in model.infos if model.infos[p].dtype == jnp.int8}
    assert small and small <= set(partition.frozen)
    assert {f"{path}_scale" for path in small} <= set(partition.frozen)
    assert any("lora" in path for path in partition.trainable)
    with pytest.raises(SettingsError, match=r"model.quantize_frozen_llm: int8 weights cannot be"):
        SALM(salm_settings(quantize_frozen_llm="int8", lora=None, freeze_params=[]))
    later = SALM(salm_settings(lora=None, freeze_params=[])).quantize("int8")  # for inference
    with pytest.raises(SettingsError, match="cannot be trained"):
        _ = later.trainable


@pytest.mark.slow  # two short runs
def test_lora_over_a_quantized_llm(tmp_path):
    """Losses near those without, weights that stay, exact resumption, and what is saved of it."""
    losses, runs = {}, {}
    for kind in (None, "int8"):
        folder = tmp_path / str(kind)
        folder.mkdir()
        config = write_config(folder, trainer={"max_steps": 6, "log_every_n_steps": 1})
        arguments = [] if kind is None else [f"+model.quantize_frozen_llm={kind}"]
        experiment.build(config, arguments).fit()
        runs[kind] = folder / "run"
        rows = [json.loads(r) for r in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        losses[kind] = [row["loss"] for row in rows if "loss" in row]
    assert len(losses[None]) == 6
    np.testing.assert_allclose(losses["int8"], losses[None], rtol=0.02)
    assert losses["int8"] != losses[None]
    run = SALM.from_pretrained(runs["int8"])
    start = SALM(yaml.safe_load((runs["int8"] / "config.yaml").read_text())["model"])
    for path in quantized_paths(run.infos):
        assert run.variables[path].dtype == jnp.int8
        np.testing.assert_array_equal(run.variables[path], start.variables[path])
    trained = [path for path in run.infos if path.endswith("lora_b")]
    assert trained and all(np.any(np.asarray(run.variables[path])) for path in trained)
    run.save_pretrained(tmp_path / "saved")
    saved = SALM.from_pretrained(tmp_path / "saved")
    assert not quantized_paths(saved.infos)
    found, expected = saved.probe()["logits"], run.probe()["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # a whole evaluation
def test_evaluate_with_a_quantized_model(tmp_path):
    audio, output = DATA / "salm" / "audio", tmp_path / "out.jsonl"
    argv = [f"pretrained_name={PLAIN}", f"inputs={audio}", f"output_manifest={output}"]
    argv += ["max_new_tokens=8", "dtype=float32", "quantize=int8", "kv_cache_dtype=int8"]
    argv += ["use_normalizer=none"]
    try:
        assert evaluate_on_one_device(argv) == 0
    finally:
        jax.config.update("jax_default_device", None)
    *rows, record = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows and all(row["pred_text"] for row in rows)
    settings = record["provenance"]["settings"]
    assert settings["quantize"] == settings["kv_cache_dtype"] == "int8"
