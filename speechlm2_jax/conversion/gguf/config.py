# pyright: basic
"""Keys of a GGUF file -> config.json, one function per architecture.

Where a file leaves a key out, the value is llama.cpp's (`load_arch_hparams` of each model).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf.hyperparameters import ARCHITECTURE, Hyperparameters
from speechlm2_jax.conversion.gguf.rotary import ROPE_FREQS, rope_scaling
from speechlm2_jax.conversion.readers import GgufFile
from speechlm2_jax.llm.families.attributes import FULL, SLIDING

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
BLOCKS_VERSION = 2
"""Of the layouts in `readers/gguf_blocks.py`; the only one that GGUF files had so far."""
GELU = "gelu_pytorch_tanh"
LARGEST_GEMMA2, LARGEST_GEMMA3 = 46, 62
"""Layers of the models of 27B, whose scores are scaled by the width that the heads share."""
Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What one `general.architecture` becomes."""

    model_type: str
    """Of Hugging Face's config.json."""
    model_class: str
    fields: Callable[[Hyperparameters, GgufFile], Fields]
    """Attributes of config.json that not all have."""
    neighbours_rotate: bool = False
    """Rows of query and key are stored so that neighbours are a rotated pair."""
    norms_are_raised: bool = False
    """Norms are stored with 1 added."""


def config_json(file: GgufFile) -> Fields:
    """The config.json of a file.

    Raises ConversionError for an unknown architecture, a missing or absurd size, and any key that
    the network would not honour.
    """
    architecture = architecture_of(file)
    keys = Hyperparameters(file)
    table = file.weights.infos.get(EMBEDDING)
    if table is None or len(table.shape) != 2:
        raise keys.error(f"the tensor {EMBEDDING} is missing, or no matrix")
    vocabulary = table.shape[0]
    if keys.size("vocab_size", vocabulary) != vocabulary:
        raise keys.error(f"{keys.name('vocab_size')} is not the height of {EMBEDDING}")
    heads = keys.size("attention.head_count")
    config: Fields = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "torch_dtype": str(table.dtype),
        "vocab_size": vocabulary,
        "hidden_size": keys.size("embedding_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "intermediate_size": keys.size("feed_forward_length"),
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in file.weights.infos,
    }
    if heads % config["num_key_value_heads"]:
        raise keys.error(f"{keys.name('attention.head_count_kv')} does not divide head_count")
    config["head_dim"] = _head_width(keys, config["hidden_size"] // heads)
    config |= architecture.fields(keys, file)
    keys.check_rest()
    return config


def architecture_of(file: GgufFile) -> Architecture:
    """The architecture of a file. Raises ConversionError for one that is not supported."""
    kind, name = file.metadata.get("general.type", "model"), file.metadata.get(ARCHITECTURE)
    if kind != "model":
        raise ConversionError(f"{file.path}: general.type is {str(kind)[:40]!r}, not a model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConversionError(
            f"{file.path}: {ARCHITECTURE} {str(name)[:40]!r} is not supported; choose among "
            f"{', '.join(ARCHITECTURES)}"
        )
    if file.metadata.get("general.quantization_version", BLOCKS_VERSION) != BLOCKS_VERSION:
        raise ConversionError(
            f"{file.path} has blocks of another version (general.quantization_version); "
            f"{BLOCKS_VERSION} is supported"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ConversionError(
            f"{file.path} is one of {file.metadata['split.count']} parts of a model; join them "
            "first (llama-gguf-split --merge FIRST_PART OUTPUT)"
        )
    return ARCHITECTURES[name]


def _head_width(keys: Hyperparameters, shared: int) -> int:
    """The width of each head; all of it must rotate, and values must be as wide."""
    rotated = keys.size("rope.dimension_count", keys.values.get("attention.key_length", shared))
    width = keys.size("attention.key_length", max(shared, 1))
    for name, other in (
        ("attention.value_length", keys.size("attention.value_length", width)),
        ("rope.dimension_count", rotated),
    ):
        if other != width:
            raise keys.error(f"{keys.name(name)}={other}, but heads are {width} wide")
    if width % 2:
        raise keys.error(f"heads are {width} wide, an odd number, which cannot rotate")
    return width


def _rope(keys: Hyperparameters, file: GgufFile, default: float = 10000.0) -> Fields:
    """rope_theta and rope_scaling, as transformers 4 writes them; 5 reads them too."""
    theta = keys.number("rope.freq_base", default)
    info, divisors = file.weights.infos.get(ROPE_FREQS), None
    if info is not None:
        count = keys.size("rope.dimension_count", keys.values.get("attention.key_length")) // 2
        if info.shape != (count,):
            raise keys.error(f"{ROPE_FREQS} has shape {list(info.shape)}, expected [{count}]")
        divisors = file.weights.read(ROPE_FREQS).astype(np.float64)
    scaling = rope_scaling(keys, theta, divisors)
    return {"rope_theta": theta} | ({} if scaling is None else {"rope_scaling": scaling})


def _has(file: GgufFile, name: str) -> bool:
    return f"blk.0.{name}" in file.weights.infos


def _no_window(keys: Hyperparameters) -> None:
    """Refuses a window that is shorter than the longest sequence."""
    window = keys.get("attention.sliding_window", 0)
    if window and not (type(window) is int and window >= keys.size("context_length")):
        raise keys.error(
            f"{keys.name('attention.sliding_window')}={str(window)[:40]}: windows are not "
            "supported for this architecture, and llama.cpp ignores them"
        )


def _llama(keys: Hyperparameters, file: GgufFile) -> Fields:
    _no_window(keys)
    return _rope(keys, file) | {
        "hidden_act": "silu",
        "attention_bias": _has(file, "attn_q.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
    }


def _qwen2(keys: Hyperparameters, file: GgufFile) -> Fields:
    _no_window(keys)
    return _rope(keys, file) | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(keys: Hyperparameters, file: GgufFile) -> Fields:
    return _qwen2(keys, file) | {"attention_bias": _has(file, "attn_q.bias")}


def _gemma(keys: Hyperparameters, file: GgufFile) -> Fields:
    _no_window(keys)
    return _rope(keys, file) | {"hidden_act": GELU}


def _layer_types(keys: Hyperparameters, period: int) -> list[str]:
    """Every `period`-th layer attends to all; or one flag per layer, true for a window."""
    layers = keys.size("block_count")
    given = keys.get("attention.sliding_window_pattern", period)
    if isinstance(given, list) and len(given) == layers:
        return [SLIDING if flag else FULL for flag in given]
    if type(given) is not int or not 0 < given <= 1 << 12:
        raise keys.error(f"{keys.name('attention.sliding_window_pattern')} is no period")
    return [SLIDING if (i + 1) % given else FULL for i in range(layers)]


def _softmax_scale(keys: Hyperparameters, largest: int) -> int:
    """query_pre_attn_scalar: the width of a head, but in the largest model."""
    width, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if keys.size("block_count") == largest:
        return width // heads
    return keys.size("attention.key_length", width // heads)


def _gemma2(keys: Hyperparameters, file: GgufFile) -> Fields:
    theta = keys.number("rope.freq_base", 10000.0)
    if keys.number("rope.freq_base_swa", theta) != theta:
        raise keys.error(f"{keys.name('rope.freq_base_swa')}: all layers have one base")
    return _rope(keys, file) | {
        "hidden_activation": GELU,
        "query_pre_attn_scalar": _softmax_scale(keys, LARGEST_GEMMA2),
        "sliding_window": keys.size("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, 2),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Hyperparameters, file: GgufFile) -> Fields:
    has_window = bool(keys.get("attention.sliding_window", 0))
    types = _layer_types(keys, 6)
    return _rope(keys, file) | {
        "hidden_activation": GELU,
        "query_pre_attn_scalar": _softmax_scale(keys, LARGEST_GEMMA3),
        "sliding_window": keys.size("attention.sliding_window") if has_window else 4096,
        "layer_types": types if has_window else [FULL] * len(types),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": keys.optional_number("final_logit_softcapping"),
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", "LlamaForCausalLM", _llama, neighbours_rotate=True),
        "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2),
        "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3),
        "gemma": Architecture("gemma", "GemmaForCausalLM", _gemma, norms_are_raised=True),
        "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, norms_are_raised=True),
        "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, norms_are_raised=True),
    }
)
"""By `general.architecture`."""
