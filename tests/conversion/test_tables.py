"""Each architecture's table fits its checkpoints exactly, and gives them back bit for bit."""

import json
from dataclasses import replace

import numpy as np
import pytest

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion import salm as salm_tables
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.fastconformer import fastconformer_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.perception import asr_table
from speechlm2_jax.conversion.readers import memory_source, open_weights, write_safetensors
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.settings import build
from tests.conversion.goldens import (
    DATA,
    NAMES,
    SALM,
    assert_same_bits,
    llm_directory,
    salm_config,
    salm_infos,
    tensors,
)

ENCODERS = json.loads((DATA / "conversion/encoder_names.json").read_text())


def llm(name: str):
    config = decoder_config(json.loads((DATA / "llm" / name / "config.json").read_text()))
    return config, describe(abstract(lambda rngs: Decoder(config, rngs=rngs)))


@pytest.mark.parametrize("name", NAMES)
def test_nemo_directory_comes_back_bit_for_bit_with_its_metadata(tmp_path, name):
    config = salm_config(name)
    source, table = open_weights(SALM / f"{name}_hf"), salm_tables.salm_table(config)
    exported = mapping.export(mapping.load(source, table, salm_infos(config)), table)
    assert_same_bits(exported, tensors(source))
    assert salm_tables.tied_aliases(config) == source.aliases
    path = tmp_path / "model.safetensors"
    write_safetensors(path, exported, salm_tables.tied_aliases(config))
    assert path.read_bytes() == (SALM / f"{name}_hf/model.safetensors").read_bytes()


def test_lightning_checkpoint_equals_the_directory_and_comes_back():
    config = salm_config("qwen3_lora")
    table, infos = salm_tables.salm_table(config), salm_infos(config)
    source = open_weights(SALM / "qwen3_lora.ckpt")
    loaded = mapping.load(source, table, infos)
    assert_same_bits(loaded, mapping.load(open_weights(SALM / "qwen3_lora_hf"), table, infos))
    assert salm_tables.tied_aliases(config) == source.aliases
    assert_same_bits(mapping.export(loaded, table), tensors(source))


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_parts_come_back_bit_for_bit(name):
    config = salm_config(name)
    infos = salm_infos(config)
    for path, table, prefixes in (
        (llm_directory(name), decoder_table(config.llm).prefixed(target="llm."), ("llm.",)),
        (
            SALM / "asr.nemo",
            asr_table(config.perception).prefixed(target="perception."),
            ("perception.encoder.", "perception.log_mel."),
        ),
    ):
        wanted = {p: i for p, i in infos.items() if p.startswith(prefixes) and "lora" not in p}
        source = open_weights(path)
        exported = mapping.export(mapping.load(source, table, wanted), table)
        heads = {n for n in source.infos if n.startswith("decoder.")}
        assert_same_bits(exported, {n: x for n, x in tensors(source).items() if n not in heads})
        assert len(heads) == (2 if path.suffix == ".nemo" else 0)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3"])
def test_hugging_face_directory_comes_back_bit_for_bit(name):
    config, infos = llm(name)
    source = open_weights(DATA / "llm" / name)
    variables = mapping.load(source, decoder_table(config), infos)
    assert_same_bits(mapping.export(variables, decoder_table(config)), tensors(source))


def test_old_llama_rotary_tables_are_left_out():
    config, infos = llm("llama")
    given = tensors(open_weights(DATA / "llm/llama"))
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6) for i in range(2)}
    variables = mapping.load(memory_source({**given, **old}), decoder_table(config), infos)
    assert_same_bits(mapping.export(variables, decoder_table(config)), given)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_table_names_every_tensor_of_nemo(name):
    config = build(FastConformerConfig, ENCODERS[name]["config"], "encoder")
    infos = describe(abstract(lambda rngs: FastConformer(config, rngs=rngs)))
    given = {
        foreign: np.random.default_rng(0).normal(size=shape).astype(np.float32)
        if not foreign.endswith("num_batches_tracked")
        else np.array(3, np.int64)
        for foreign, shape in ENCODERS[name]["shapes"].items()
    }
    table = fastconformer_table(config)
    exported = mapping.export(mapping.load(memory_source(given), table, infos), table)
    assert_same_bits(exported, given)


def test_tied_position_biases_are_one_tensor_under_every_layer():
    cfg = {**ENCODERS["offline_xscale"]["config"], "untie_biases": False}
    config = build(FastConformerConfig, cfg, "encoder")
    infos = describe(abstract(lambda rngs: FastConformer(config, rngs=rngs)))
    table = fastconformer_table(config)
    given = {
        foreign: np.zeros(shape, np.int64 if "tracked" in foreign else np.float32)
        for foreign, shape in ENCODERS["offline_xscale"]["shapes"].items()
    }
    variables = mapping.load(memory_source(given), table, infos)
    assert variables["position_bias_u"].shape == (4, 8)
    exported = mapping.export(variables, table)
    exported |= {alias: exported[name] for alias, name in mapping.aliases(table).items()}
    assert_same_bits(exported, given)
    given["layers.1.self_attn.pos_bias_u"] = np.ones((4, 8), np.float32)
    with pytest.raises(ConversionError, match="they differ"):
        mapping.load(memory_source(given), table, infos)


ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [ALL_TARGETS[:1], ALL_TARGETS, ("v_proj", "down_proj")])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_wraps_exactly_the_layers_it_targets(targets, bias):
    config = salm_config("qwen3_lora")
    decoder = replace(config.llm, attention_bias=bias, output_bias=bias)
    config = replace(config, lora=LoraConfig(r=2, target_modules=targets), llm=decoder)
    names = {s.name for s in mapping.names(salm_tables.salm_table(config), salm_infos(config))}
    prefix = "llm.base_model.model.model.layers.1."
    for target in ALL_TARGETS:
        block = "self_attn" if target in ALL_TARGETS[:4] else "mlp"
        wrapped = target in targets
        linear = f"{prefix}{block}.{target}"
        assert (f"{linear}.base_layer.weight" in names) == wrapped
        assert (f"{linear}.lora_A.default.weight" in names) == wrapped
        assert (f"{linear}.lora_B.default.weight" in names) == wrapped
        assert (f"{linear}.weight" in names) != wrapped
        if bias and block == "self_attn":
            assert f"{linear}.base_layer.bias" in names or f"{linear}.bias" in names


@pytest.mark.parametrize("name", NAMES)
def test_embedding_and_head_are_read_from_either_place(name):
    config = salm_config(name)
    table, infos = salm_tables.salm_table(config), salm_infos(config)
    llm_prefix = "llm.base_model.model." if config.lora else "llm."
    given = tensors(open_weights(SALM / f"{name}_hf"))
    expected = mapping.load(memory_source(given), table, infos)
    moved = dict(given)
    moved[f"{llm_prefix}model.embed_tokens.weight"] = moved.pop("embed_tokens.weight")
    if not config.llm.tied:
        moved["lm_head.weight"] = moved.pop(f"{llm_prefix}lm_head.weight")
    assert_same_bits(mapping.load(memory_source(moved), table, infos), expected)


def test_a_checkpoint_of_another_wrapper_is_refused_by_name():
    config = salm_config("qwen3_lora", lora=False)
    with pytest.raises(
        ConversionError, match=r"adapters .LoRA. that are not merged .llm\.base_model"
    ):
        mapping.load(
            open_weights(SALM / "qwen3_lora_hf"),
            salm_tables.salm_table(config),
            salm_infos(config),
        )
