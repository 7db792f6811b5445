"""config.json is read whole or refused; writing it back loses nothing."""

import json

import pytest
from transformers import Qwen3Config

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.layers.rope import LinearScaling, Llama3Scaling, RopeConfig
from speechlm2_jax.llm.config import DecoderConfig
from tests.conversion.goldens import DATA

GOLDENS = ("llama", "llama3", "qwen2", "qwen3")


def golden(name: str) -> dict:
    return json.loads((DATA / "llm" / name / "config.json").read_text())


def in_v4_dialect(config: dict) -> dict:
    """The same settings as transformers 4 writes them."""
    rope = dict(config.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    return {**config, "rope_theta": theta, "rope_scaling": scaling}


@pytest.mark.parametrize("name", GOLDENS)
def test_both_dialects_mean_the_same(name):
    assert decoder_config(in_v4_dialect(golden(name))) == decoder_config(golden(name))


def test_llama3_rope_scaling_is_read():
    assert decoder_config(golden("llama3")).rope == RopeConfig(
        theta=500000.0,
        scaling=Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=64
        ),
    )


def test_old_spelling_of_the_scaling_type_is_read():
    config = {**in_v4_dialect(golden("llama")), "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert decoder_config(config).rope.scaling == LinearScaling(factor=2.0)


def test_families_differ_where_their_models_do():
    llama, qwen2, qwen3 = (decoder_config(golden(n)) for n in ("llama", "qwen2", "qwen3"))
    assert (llama.qk_norm, qwen2.qk_norm, qwen3.qk_norm) == ("none", "none", "head")
    assert (qwen2.attention_bias, qwen2.output_bias, llama.attention_bias) == (True, False, False)
    assert qwen3.tied and not llama.tied
    assert qwen2.head_width == 8  # width / heads: the attribute is absent
    absent = {k: v for k, v in golden("qwen3").items() if k != "head_dim"}
    assert decoder_config(absent).head_width == Qwen3Config().head_dim


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_sizes": 48}, "hidden_sizes=48 is not known here .nearest: hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mamba"}, "'mamba' is not supported; choose among llama, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "model_type .'llama'. is not supported"),
        ({"model_type": None}, "model_type is missing"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "nearest is mistral, which is another model: num_local_experts=8: mixtures of experts",
        ),
        ({"model_type": "qwen2_vl"}, "further inputs: save its language model alone .qwen2."),
        ({"model_type": "llava", "text_config": {"model_type": "qwen3"}}, "alone .qwen3."),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}}, "full_attention"),
        (
            {"model_type": "hunyuan_v1_dense"}
            | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "alpha": 9.0}},
            "alpha=9.0 is for rotary scaling 'dynamic', not 'linear'",
        ),
        (
            {
                "rope_parameters": {"rope_type": "longrope", "factor": 2.0}
                | {"short_factor": [1.0], "long_factor": [1.0]}
            },
            "short_factor has 1 numbers",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 5.0, "rope_parameters": None},
            "attn_logit_softcapping=5.0: capped logits",
        ),
        ({"hidden_act": "softplus"}, "activation='softplus'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"use_sliding_window": True}, "no layers with a window"),
        ({"layer_types": ["sliding_attention"]}, "full attention only"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "'su' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": [1]}, "no mapping"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "wide"),
        ({"num_key_value_heads": 3}, "must divide"),
    ],
)
def test_what_the_network_would_not_honour_is_refused(change, match):
    with pytest.raises(ConversionError, match=match):
        decoder_config({**golden("llama"), **change})


def test_every_size_reaches_its_field():
    config = decoder_config(
        {
            "model_type": "llama",
            "vocab_size": 11,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "intermediate_size": 36,
            "rms_norm_eps": 1e-4,
            "rope_theta": 5e5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "initializer_range": 0.5,
        }
    )
    assert config == DecoderConfig(
        vocab_size=11,
        width=24,
        layers=3,
        heads=4,
        kv_heads=2,
        head_width=10,
        mlp_width=36,
        norm_eps=1e-4,
        rope=RopeConfig(theta=5e5),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=True,
        init_std=0.5,
    )
