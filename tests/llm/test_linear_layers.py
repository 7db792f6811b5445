"""LoRA's target_modules are names of the LLM's own layers, matched as PEFT matches them."""

from dataclasses import replace

import pytest

from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.linear_layers import fit_lora, lora_note

LLAMA = DecoderConfig(
    vocab_size=8, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=8
)
PHI = replace(LLAMA, family="phi", gated=False)
PHI3 = replace(LLAMA, family="phi3", fused_qkv=True, fused_gate_up=True)
SALM_YAML = LoraConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))


def test_without_names_they_are_pefts_for_the_family():
    # peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING; phi3 has none there
    assert fit_lora(LoraConfig(), LLAMA).target_modules == ("q_proj", "v_proj")
    assert fit_lora(LoraConfig(), PHI).target_modules == ("q_proj", "v_proj", "fc1", "fc2")
    assert fit_lora(LoraConfig(), PHI3).target_modules == ("qkv_proj",)


def test_all_linear_names_every_layer_of_the_family():
    everything = LoraConfig(target_modules="all-linear")
    assert fit_lora(everything, PHI3).target_modules == (
        *("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    )
    assert fit_lora(everything, PHI).targets == {"query", "key", "value", "output", "up", "down"}
    assert lora_note(everything, PHI3) is None


def test_names_of_other_families_are_left_out_and_told():
    assert fit_lora(SALM_YAML, LLAMA).target_modules == SALM_YAML.target_modules
    assert lora_note(SALM_YAML, LLAMA) is None
    assert fit_lora(SALM_YAML, PHI3).target_modules == ("o_proj",)
    note = lora_note(SALM_YAML, PHI3)
    assert note is not None
    assert note.startswith("lora.target_modules: q_proj, k_proj, v_proj name no layer")
    assert "phi3" in note and "qkv_proj" in note


def test_a_layer_is_named_by_the_end_of_its_path():
    parts = LoraConfig(target_modules=("self_attn.q_proj", "mlp.v_proj"))
    assert fit_lora(parts, LLAMA).target_modules == ("self_attn.q_proj",)


def test_names_that_match_nothing_are_refused_with_the_layers_that_there_are():
    with pytest.raises(ValueError, match=r"c_fc name no layer.*llama.*q_proj.*down_proj"):
        fit_lora(LoraConfig(target_modules="c_fc"), LLAMA)
