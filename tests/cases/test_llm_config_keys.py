"""Keys of published config.json files that compute nothing are no reason to refuse a model."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from speechlm2_jax.conversion import hf_keys
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.llm.families import FAMILIES
from speechlm2_jax.llm.families.attributes import Attributes

LLMS = Path(__file__).parents[1] / "data/llm"


def config(name: str) -> dict:
    return json.loads((LLMS / name / "config.json").read_text())


PUBLISHED = {
    "SmolLM2": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}},
        "rope_scaling": None,
    },
    "Vicuna and the first Llama": {
        "max_sequence_length": 2048,
        "temperature": 0.9,
        "top_p": 0.6,
        "pad_token_id": -1,
    },
    "Unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.1", "unsloth_template": "x"},
    "TRL and axolotl": {"neftune_noise_alpha": 5, "axolotl_config": {"a": 1}, "trl_version": "1"},
    "PEFT": {"peft_version": "0.21.2", "peft_type": "LORA"},
    "AutoTrain": {
        "_num_labels": 2,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": None,
        "autotrain_version": "1",
    },
    "transformers 4 in full": {
        "return_dict": True,
        "torchscript": False,
        "use_bfloat16": False,
        "tf_legacy_loss": False,
        "pruned_heads": {},
        "tie_encoder_decoder": False,
        "is_encoder_decoder": False,
        "is_decoder": False,
        "add_cross_attention": False,
        "cross_attention_hidden_size": None,
        "chunk_size_feed_forward": 0,
        "max_length": 20,
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "bad_words_ids": None,
        "finetuning_task": None,
        "tokenizer_class": "LlamaTokenizer",
        "prefix": None,
        "task_specific_params": None,
        "quantization_config": None,
        "_attn_implementation": "flash_attention_2",
        "_commit_hash": "0",
        "_flash_attn_2_enabled": True,
        "gradient_checkpointing": True,
    },
    "neutral values": {
        "partial_rotary_factor": 1.0,
        "logits_scaling": 1.0,
        "embedding_multiplier": 1,
        "residual_multiplier": 1.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "attention_bias": False,
        "mlp_bias": False,
        "final_logit_softcapping": None,
        "num_experts": 0,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "is_causal": True,
        "position_embedding_type": "rope",
        "norm_type": "rmsnorm",
        "layer_norm_eps": 1e-05,
        "no_rope_layers": [1, 1],
        "attention_multiplier": 12**-0.5,
        "query_pre_attn_scalar": 12,
        "hidden_activation": "silu",
        "original_max_position_embeddings": 4096,
        "a_key_of_tomorrow": None,
        "rope_theta": None,
    },
    "Llama 3 recipes": {"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "auto_map": {
        "AutoTokenizer": ["tokenization.X", None]}},
    "DeepSeek and Qwen2.5-1M": {"use_mrope": False, "dual_chunk_attention_config": {"c": 1}},
}  # fmt: skip


@pytest.mark.parametrize("who", PUBLISHED)
def test_keys_of_published_models_change_nothing(who):
    plain = config("llama")
    assert decoder_config(plain | PUBLISHED[who]) == decoder_config(plain)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rope_interleaved": True}, "neighbouring"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"attention_multiplier": 0.5}, "sqrt"),
        ({"logits_scaling": 8.0}, "scaled"),
        ({"final_logit_softcapping": 30.0}, "capped"),
        ({"qk_norm": True}, "normed"),
        ({"qkv_bias": True}, "biases"),
        ({"num_experts": 8}, "experts"),
        ({"num_nextn_predict_layers": 1}, "several tokens"),
        ({"is_causal": False}, "causal"),
        ({"rope_condense_ratio": 8}, "rope_scaling"),
        ({"no_rope_layers": [1, 0]}, "without rotary"),
        ({"layer_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"hidden_activation": "gelu"}, "hidden_act"),
        ({"pruned_heads": {"0": [1]}}, "differ from each other"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "never run"),
        ({"alibi": True}, "rotary"),
        ({"attention_dropout": 0.1}, "write 0.0"),
        ({"invented_gate": 3}, "delete it if it computes nothing"),
    ],
)
def test_what_changes_the_maths_is_refused_by_value(change, why):
    with pytest.raises(ConversionError, match=why):
        decoder_config(config("llama") | change)


def test_all_refused_keys_are_named_at_once():
    with pytest.raises(ConversionError, match=r"alibi=True.*num_experts=8.*x{9}") as raised:
        decoder_config(config("llama") | {"alibi": True, "num_experts": 8, "y": "x" * 1000})
    assert len(str(raised.value)) < 600


def test_biases_and_norms_of_the_family_may_be_written_out():
    assert decoder_config(config("qwen2") | {"qkv_bias": True}) == decoder_config(config("qwen2"))
    assert decoder_config(config("qwen3") | {"qk_norm": True}) == decoder_config(config("qwen3"))
    with pytest.raises(ConversionError, match="normed"):
        decoder_config(config("qwen3") | {"use_qk_norm": False})


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3"])
def test_every_attribute_that_transformers_writes_is_in_a_list(name):
    made = transformers.AutoConfig.for_model(**config(name))
    everything = {k: v for k, v in made.to_dict().items() if k != "quantization_config"}
    assert decoder_config(json.loads(json.dumps(everything))) == decoder_config(config(name))


def test_ignored_keys_change_no_logit_of_transformers():
    everything = {k: v for extra in PUBLISHED.values() for k, v in extra.items()}
    skipped = (
        "quantization_config",
        "auto_map",
        "_attn_implementation",
        "torchscript",
        "pruned_heads",
    )
    extra = {k: v for k, v in everything.items() if k not in skipped}
    ids = torch.tensor([[5, 9, 2, 7]])
    logits = []
    for changes in ({}, extra):
        made = transformers.AutoConfig.for_model(**(config("llama") | changes))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_every_key_has_a_reason_and_is_in_one_list():
    tables = (hf_keys.NO_EFFECT, hf_keys.BY_VALUE, hf_keys.BEGINNINGS)
    assert all(key.reason for table in tables for key in table.values())
    assert not set(hf_keys.NO_EFFECT) & set(hf_keys.BY_VALUE)
    attributes = Attributes(config("llama"))
    FAMILIES["llama"].read(attributes)
    of_some_families = {"attention_bias", "mlp_bias"}  # the others take them as false
    both = attributes.read & (set(hf_keys.NO_EFFECT) | set(hf_keys.BY_VALUE))
    assert both == of_some_families <= set(hf_keys.BY_VALUE)
    assert all(key.neutral is not None for key in hf_keys.BY_VALUE.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 10**18}, "hidden_size=1000000000000000000 is not a size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_attention_heads": 4.5}, "whole number"),
        ({"num_attention_heads": True}, "whole number"),
        ({"intermediate_size": "40"}, "whole number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf should be a finite"),
        ({"rms_norm_eps": 10**400}, "finite number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta=nan"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor=0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
    ],
)
def test_absurd_numbers_are_one_line(change, match):
    with pytest.raises(ConversionError, match=match):
        decoder_config(config("llama") | change)
