"""A speech model's LLM as a plain Hugging Face directory, with LoRA merged or beside it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import speechlm2_jax as slm
from convert import main
from speechlm2_jax.conversion.casting import DTYPES
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import memory_source, open_weights
from speechlm2_jax.conversion.writers.shards import write_shards
from tests.conversion.goldens import DATA, SALM, assert_same_bits, tensors

LORA = SALM / "qwen3_lora_hf"
BASE = DATA / "llm/qwen3"
ADAPTED = ("q_proj", "v_proj")
SCALE = 8 / 4  # alpha / r of the recorded adapters
ATOL = 1e-4
"""Of a whole model in fp32."""


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SALM)  # its config names the LLM relative to itself
        return slm.models.SALM.from_pretrained(LORA.name)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("hf") / "llm"
    model.save_llm(made)
    return made


def merged_weights() -> dict[str, np.ndarray]:
    """The recorded base weights and adapters, added up by PEFT's formula."""
    stored = tensors(open_weights(LORA))
    root, made = (
        "llm.base_model.model.",
        {"model.embed_tokens.weight": stored["embed_tokens.weight"]},
    )
    for name, value in stored.items():
        if not name.startswith(root) or "lora" in name:
            continue
        plain = name.removeprefix(root).replace("base_layer.", "")
        layer = name.removesuffix("base_layer.weight")
        if layer != name:
            a, b = (stored[f"{layer}lora_{side}.default.weight"] for side in "AB")
            value = value + SCALE * (b.astype(np.float64) @ a.astype(np.float64))
        made[plain] = value
    return made


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 300, (2, 9))


def test_the_llm_directory_has_transformers_names_and_merged_weights(directory):
    made, expected = tensors(open_weights(directory)), merged_weights()
    assert made.keys() == tensors(open_weights(BASE)).keys() == expected.keys()
    changed = 0
    for name, value in expected.items():
        np.testing.assert_allclose(made[name], value, atol=1e-6, err_msg=name)
        changed += any(part in name for part in ADAPTED)
    assert changed == 4


def test_transformers_opens_the_llm_directory_and_computes_the_same(model, directory, monkeypatch):
    import torch
    import transformers

    monkeypatch.chdir(directory.parent)  # nothing in it refers to another folder
    opened = transformers.AutoModelForCausalLM.from_pretrained("llm").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("llm")
    with torch.no_grad():
        embeds = opened.get_input_embeddings()(torch.tensor(ids()))
        expected = opened(inputs_embeds=embeds).logits.numpy()
    np.testing.assert_allclose(model(embeds.numpy())["logits"], expected, atol=ATOL)
    text = "hello there"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.tokenizer.text_to_ids(
        text
    )
    recorded = json.loads((BASE / "generation_config.json").read_text())
    assert json.loads((directory / "generation_config.json").read_text()) == recorded
    assert opened.generation_config.eos_token_id == recorded["eos_token_id"]


def test_config_names_the_class_and_the_written_dtype(model, directory, tmp_path):
    model.save_llm(tmp_path, dtype="bfloat16")
    made = json.loads((tmp_path / "config.json").read_text())
    assert made["torch_dtype"] == "bfloat16"
    assert made["architectures"] == ["Qwen3ForCausalLM"]
    assert all(x.dtype == DTYPES["bfloat16"] for x in tensors(open_weights(tmp_path)).values())
    whole = tensors(open_weights(directory))
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(  # merged in fp32, rounded once
        open_weights(tmp_path).read(name), whole[name].astype(DTYPES["bfloat16"])
    )


def test_without_merging_the_adapter_is_beside_the_base(model, tmp_path):
    model.save_llm(tmp_path, merge_lora=False)
    stored = tensors(open_weights(LORA))
    adapter = tensors(open_weights(tmp_path / "adapter/adapter_model.safetensors"))
    assert_same_bits(
        adapter,
        {
            name.removeprefix("llm.").replace(".default", ""): value
            for name, value in stored.items()
            if "lora_" in name
        },
    )
    query = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(
        open_weights(tmp_path).read(f"{query}.weight"),
        stored[f"llm.base_model.model.{query}.base_layer.weight"],
    )
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    assert config.items() >= expected.items()
    assert config["base_model_name_or_path"] is None


def test_a_merged_model_generates_the_same_without_lora(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", merge_lora=True)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert "lora" not in config
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    merged = slm.models.SALM.from_pretrained(tmp_path / "moved")
    assert not any("lora" in path for path in merged.variables)
    embeds = np.random.default_rng(1).normal(size=(1, 7, 48)).astype(np.float32)
    logits = np.asarray(model(embeds)["logits"])
    np.testing.assert_allclose(merged(embeds)["logits"], logits, atol=ATOL)
    assert np.abs(logits).max() > 100 * ATOL


def test_generation_config_stays_with_the_model_however_often_it_is_saved(model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    slm.models.SALM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    made = json.loads((tmp_path / "second/llm_backbone/generation_config.json").read_text())
    assert made == json.loads((BASE / "generation_config.json").read_text())


def test_shards_hold_every_tensor_once(tmp_path):
    source = open_weights(BASE)
    files = write_shards(tmp_path, source, 40_000)
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(info.size_bytes for info in source.infos.values())
    assert all(file.stat().st_size < max(40_000, largest) + 4_000 for file in files)
    assert_same_bits(tensors(open_weights(tmp_path)), tensors(source))


def test_a_value_that_the_dtype_cannot_hold_leaves_nothing(tmp_path):
    source = memory_source({"a": np.ones(3, np.float32), "b": np.full(2, 1e6, np.float32)})
    from speechlm2_jax.conversion.casting import cast_source

    with pytest.raises(ConversionError, match="b has values beyond float16"):
        write_shards(tmp_path / "new", cast_source(source, "float16"))
    assert not (tmp_path / "new").exists()


def test_the_script_writes_what_the_library_writes(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(SALM)
    assert main([LORA.name, str(tmp_path / "llm"), "--to", "hf", "--no-self-test"]) == 0
    for path in directory.rglob("*"):
        assert (tmp_path / "llm" / path.name).read_bytes() == path.read_bytes()
    assert f"{len(merged_weights())} tensors" in capsys.readouterr().out
    assert (
        main(
            [LORA.name, str(tmp_path / "apart"), "--to", "hf", "--no-merge-lora", "--no-self-test"]
        )
        == 0
    )
    assert (tmp_path / "apart/adapter/adapter_config.json").is_file()
    assert main([LORA.name, str(tmp_path / "whole"), "--merge-lora", "--no-self-test"]) == 0
    assert "lora" not in json.loads((tmp_path / "whole/config.json").read_text())


def test_an_llm_in_another_dtype_keeps_its_files_and_names_the_dtype(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(BASE, source, ignore=shutil.ignore_patterns("golden.*"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors.index.json.txt").write_text("kept")
    assert (
        main(
            [
                str(source),
                str(tmp_path / "half"),
                "--to",
                "hf",
                "--dtype",
                "float16",
                "--no-self-test",
            ]
        )
        == 0
    )
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert config["torch_dtype"] == "float16" and "dtype" not in config
    for path in source.iterdir():
        copy = tmp_path / "half" / path.name
        if path.name not in ("config.json", "model.safetensors"):
            assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([str(SALM / "asr.nemo"), "out", "--to", "hf"], "has no LLM"),
        ([str(BASE), "out", "--merge-lora"], "is not a speech model"),
    ],
)
def test_what_has_no_llm_or_no_lora_is_refused(tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert match in capsys.readouterr().err
    assert not Path("out").exists()
