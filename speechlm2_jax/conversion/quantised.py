# pyright: basic
"""Weights that are not plain numbers: quantised, or adapters alone. Config and names tell."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError

CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")
METHODS = MappingProxyType(
    {
        "gptq": "GPTQ",
        "awq": "AWQ",
        "bitsandbytes": "bitsandbytes",
        "fp8": "FP8",
        "fbgemm_fp8": "FP8 (FBGEMM)",
        "hqq": "HQQ",
        "aqlm": "AQLM",
        "mxfp4": "MXFP4",
    }
)
"""How each method is written, where it is not as in config.json."""
NAMES = (
    (r".*\.(?:qweight|qzeros|g_idx)", "weights quantised by GPTQ or AWQ"),
    (r".*(?:\.absmax|\.quant_map|\.nested_absmax|\.SCB|\.quant_state\.bitsandbytes__.*)",
     "weights quantised by bitsandbytes"),
    (r".*(?:\.weight_packed|\.weight_shape|\.weight_zero_point)",
     "weights quantised by compressed-tensors"),
    (r".*(?:_scale_inv|\.weight_scale|\.weight_scale_2|\.input_scale|\.k_scale|\.v_scale)",
     "weights quantised to FP8 or FP4, with their scales"),
    (r".*_proj_(?:blocks|scales)", "weights quantised to MXFP4"),
    (r".*(?:_proj|embed_tokens|lm_head)\.(?:scales|biases)", "weights quantised by MLX"),
    (r".*_proj\.(?:W_q|meta)", "weights quantised by HQQ"),
    (r".*_proj\.(?:codes|codebooks)", "weights quantised by AQLM"),
)  # fmt: skip
"""Endings of tensors that only quantised weights have."""
ADAPTERS = (
    r".*\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w\d_[ab]|ia3_l)(?:\..*)?"
)
PLAIN = (
    "quantised weights are not supported; use the original model, or write plain weights first "
    "(transformers: model.dequantize().save_pretrained(DIR))"
)


def check_config(config: Mapping[str, object]) -> None:
    """Raises ConversionError, naming the method, if config.json describes quantised weights."""
    for key in CONFIG_KEYS:
        block = config.get(key)
        if not block:
            continue
        raise ConversionError(
            f"config.json of the LLM: {key}: weights quantised by {_method(key, block)}; {PLAIN}; "
            f"if the weights are plain already, delete {key}"
        )


def problem(names: Iterable[str], *, has_adapters: bool) -> str:
    """What tensors that fit nowhere are, and what to do; "" if their names do not tell.

    `has_adapters`: the model has LoRA itself, so that names of LoRA say nothing.
    """
    left = sorted(names)
    for pattern, what in NAMES:
        found = next((name for name in left if re.fullmatch(pattern, name)), None)
        if found is not None:
            return f"the checkpoint holds {what} ({found}); {PLAIN}"
    found = next((name for name in left if re.fullmatch(ADAPTERS, name)), None)
    if found is not None and not has_adapters:
        return (
            f"the checkpoint holds adapters (LoRA) that are not merged ({found}); merge them first "
            "(PEFT: model.merge_and_unload().save_pretrained(DIR)), or give the lora block "
            "that they were trained with"
        )
    return ""


def _method(key: str, block: object) -> str:
    settings: Mapping[str, Any] = block if isinstance(block, Mapping) else {}
    if key == "quantization" and "quant_method" not in settings:
        method = "MLX" if "group_size" in settings else "a tool that it does not name"
    else:
        named = str(settings.get("quant_method") or settings.get("quant_algo") or "")[:40]
        method = METHODS.get(named, named or "a method that it does not name")
    bits = next((settings[k] for k in ("bits", "w_bit", "num_bits") if settings.get(k)), None)
    if settings.get("load_in_4bit"):
        bits = 4
    elif settings.get("load_in_8bit"):
        bits = 8
    return f"{method}, {bits} bits" if isinstance(bits, int) and bits < 1000 else method
