"""An LLM's weights under the names that other classes, wrappers and versions give them."""

import json
import re

import numpy as np
import pytest
import torch
import transformers

import train
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import memory_source, open_weights, write_safetensors
from speechlm2_jax.conversion.salm import salm_table
from tests.cases.test_tied_llm import CONFIG, EMBEDDING, INFOS, QWEN3, SALM_SAVED, load, stored
from tests.conversion.goldens import assert_same_bits, salm_config, salm_infos, tensors
from tests.training.tiny_salm import LLAMA, write_config


def renamed(change) -> dict[str, np.ndarray]:
    return {change(name): value for name, value in stored().items()}


RENAMINGS = {
    "a model saved without its head": lambda n: n.removeprefix("model."),
    "torch.compile": lambda n: f"_orig_mod.{n}",
    "torch.compile of a part": lambda n: n.replace("model.", "model._orig_mod.", 1),
    "torch.compile of each layer": lambda n: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", n),
    "DistributedDataParallel": lambda n: f"module.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "PEFT": lambda n: f"base_model.model.{n}",
    "a module of one's own": lambda n: f"model.{n}",
    "FSDP": lambda n: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", n),
}


@pytest.mark.parametrize("who", RENAMINGS)
def test_names_of_wrappers_and_of_the_base_model_are_read(who):
    expected = load(open_weights(QWEN3))
    assert_same_bits(load(memory_source(renamed(RENAMINGS[who]))), expected)


@pytest.mark.parametrize("who", ["DistributedDataParallel", "torch.compile"])
def test_copies_and_aliases_are_found_behind_wrappers(who):
    change = RENAMINGS[who]
    expected = load(open_weights(QWEN3))
    alias = {change("lm_head.weight"): change(EMBEDDING)}
    assert_same_bits(load(memory_source(renamed(change), alias)), expected)
    both = renamed(change) | {change("lm_head.weight"): stored()[EMBEDDING].copy()}
    assert_same_bits(load(memory_source(both)), expected)


def test_a_wrapper_that_not_every_name_has_is_refused():
    mixed = renamed(lambda n: f"module.{n}" if "layers.1" in n else n)
    with pytest.raises(ConversionError, match=r"lacks model\.layers\.1"):
        load(memory_source(mixed))
    twice = {**stored(), f"_orig_mod.{EMBEDDING}": stored()[EMBEDDING]}
    with pytest.raises(ConversionError, match="without their wrappers"):
        load(memory_source(twice))


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
    ],
)
def test_stored_rotary_frequencies_are_left_out(name):
    extra = {**stored(), name: np.ones(8, np.float32)}
    assert_same_bits(load(memory_source(extra)), load(open_weights(QWEN3)))
    assert any(i.reason for i in decoder_table(CONFIG).ignored)


def test_rotary_frequencies_inside_a_nemo_checkpoint_are_left_out():
    config = salm_config("qwen3_lora")
    weights = tensors(open_weights(SALM_SAVED))
    expected = mapping.load(memory_source(weights), salm_table(config), salm_infos(config))
    weights["llm.base_model.model.model.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    found = mapping.load(memory_source(weights), salm_table(config), salm_infos(config))
    assert_same_bits(found, expected)


def test_a_base_model_of_transformers_loads(tmp_path):
    config = transformers.AutoConfig.for_model(**json.loads((QWEN3 / "config.json").read_text()))
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    weights = tensors(open_weights(tmp_path))
    assert "embed_tokens.weight" in weights
    variables = load(open_weights(tmp_path))
    np.testing.assert_array_equal(variables["embedding.weight"], weights["embed_tokens.weight"])
    assert set(variables) == set(INFOS)


def write_llm(folder, change):
    """The tiny Llama, changed: config and tensors; its tokenizer stays."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((LLAMA / name).read_bytes())
    weights = tensors(open_weights(LLAMA))
    if change == "lfs":
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        (folder / "model.safetensors").write_bytes(pointer)
        return
    if change == "no head":
        del weights["lm_head.weight"]
    if change == "fewer rows":
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1]
    if change == "integers":
        weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.int32)
    if change == "gptq":
        name = "model.layers.0.self_attn.q_proj"
        del weights[f"{name}.weight"]
        weights[f"{name}.qweight"] = np.zeros((4, 4), np.int32)
    if change == "tied":
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lfs", "Git LFS pointer"),
        ("no head", "saved without its head"),
        ("fewer rows", "lm_head.weight has shape"),
        ("integers", "int32"),
        ("gptq", "GPTQ"),
        ("tied", "tie_word_embeddings"),
    ],
)
def test_a_dry_run_checks_the_weights(tmp_path, capsys, change, words):
    write_llm(tmp_path / "llm", change)
    config = write_config(tmp_path, llm=tmp_path / "llm", trainer={"max_steps": 4})
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", str(config), "--dry-run"])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("train.py:")
    assert not (tmp_path / "run").exists()
