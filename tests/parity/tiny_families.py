"""A tiny random model of each family, as transformers makes it."""

import warnings
from functools import cache
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5, "head_dim": 12},
    "ministral": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5},
    },
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {"sliding_window": 7},
    "phi3-longrope": {  # from the first token on long, or never: see docs/llm.md
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 12},
        "original_max_position_embeddings": 12,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 3},
    "nemotron": {"head_dim": 16, "mlp_bias": True, "attention_bias": True},
    "olmo2": {},
    "olmo3": {
        "sliding_window": 5,
        "num_hidden_layers": 5,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "cohere2": {"sliding_window": 5, "num_hidden_layers": 5},
    "arcee": {"rope_parameters": YARN},
    "apertus": {"rope_parameters": LLAMA3},
    "seed_oss": {
        "head_dim": 16,
        "attention_out_bias": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 3, "num_hidden_layers": 4},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 20.0, "rope_theta": 1000.0}
        | {"factor": 1.0},
    },
    "phi": {},
    "stablelm": {"use_qkv_bias": True},
    "stablelm-parallel": {"use_parallel_residual": True},
    "starcoder2": {"sliding_window": 5},
}
"""Name -> what differs from `COMMON`; a name may add a word to the model_type."""


@cache
def tiny_model(name: str, **changes: Any) -> torch.nn.Module:
    """The model in fp32, every parameter moved away from its initial value."""
    model_type = name.split("-")[0]
    settings = {**COMMON, **MODELS[name], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(model_type, **settings)
        config._attn_implementation = "eager"
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    """The config.json that transformers writes."""
    return model.config.to_diff_dict() | {"model_type": model.config.model_type}
