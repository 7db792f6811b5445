"""Hugging Face's config.json <-> DecoderConfig, closed on both sides.

Every attribute is read, or is listed here as ignored with its reason, or is an error: a setting
that the network does not honour must not pass in silence. Both dialects are read: transformers 4
(`rope_theta` + `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`).
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.layers.rope import LinearScaling, Llama3Scaling, RopeConfig
from speechlm2_jax.llm.config import DecoderConfig

Json = Mapping[str, Any]

HANDLED = frozenset(
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim intermediate_size hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters "
    "tie_word_embeddings initializer_range attention_bias mlp_bias".split()
)
_TEXT = "tokenizer and generation settings are read elsewhere"
_RUNTIME = "how transformers runs or names the model; no effect on what it computes"
IGNORED: Mapping[str, str] = MappingProxyType(
    {
        "architectures": _RUNTIME,
        "_name_or_path": _RUNTIME,
        "_attn_implementation_autoset": _RUNTIME,
        "transformers_version": _RUNTIME,
        "use_cache": _RUNTIME,
        "return_dict": _RUNTIME,
        "output_attentions": _RUNTIME,
        "output_hidden_states": _RUNTIME,
        "pretraining_tp": "slices products across devices; the mesh does that here",
        "dtype": "weights keep the dtype of the file; trainer.precision chooses the computation's",
        "torch_dtype": "weights keep the dtype of the file; trainer.precision chooses the rest",
        "max_position_embeddings": "rotary positions have no table to size",
        "bos_token_id": _TEXT,
        "eos_token_id": _TEXT,
        "pad_token_id": _TEXT,
        "max_window_layers": "only read with use_sliding_window, which is refused",
        "sliding_window": "only read with use_sliding_window, which is refused",
    }
)
REFUSED: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "attention_dropout": ("dropout on attention weights is not done", lambda v: not v),
        "use_sliding_window": ("sliding-window attention is not done", lambda v: not v),
        "use_mrope": ("multimodal rotary positions are not done", lambda v: not v),
        "layer_types": (
            "only full attention is done",
            lambda v: v is None or set(v) <= {"full_attention"},
        ),
    }
)
"""Attribute -> what is missing, and the values under which it is not needed."""
ROPE_SCALINGS: Mapping[str, tuple[Callable[..., Any] | None, Mapping[str, str]]] = MappingProxyType(
    {
        "default": (None, {}),
        "linear": (LinearScaling, {"factor": "factor"}),
        "llama3": (
            Llama3Scaling,
            {
                "factor": "factor",
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_max_position_embeddings": "original_positions",
            },
        ),
    }
)
"""rope_type -> our class, and its fields by their foreign names."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model_type means where its config.json says nothing."""

    qk_norm: bool = False
    attention_bias: bool | None = None
    """Biases of query, key and value; None: as the attribute says."""
    output_bias: bool | None = None
    mlp_bias: bool | None = False
    head_dim: int | None = None
    architecture: str = ""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(mlp_bias=None, architecture="LlamaForCausalLM"),
        "qwen2": Family(attention_bias=True, output_bias=False, architecture="Qwen2ForCausalLM"),
        "qwen3": Family(qk_norm=True, head_dim=128, architecture="Qwen3ForCausalLM"),
    }
)


def decoder_config(config: Json) -> DecoderConfig:
    """Translates config.json.

    Raises ConversionError for an unsupported model_type, a missing size, and any attribute or
    value that the network would not honour.
    """
    family = _family(config)
    _check_attributes(config)
    try:
        heads = int(_required(config, "num_attention_heads"))
        width = int(_required(config, "hidden_size"))
        bias = bool(config.get("attention_bias") or False)
        return DecoderConfig(
            vocab_size=int(_required(config, "vocab_size")),
            width=width,
            layers=int(_required(config, "num_hidden_layers")),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or family.head_dim or width // heads),
            mlp_width=int(_required(config, "intermediate_size")),
            activation=str(config.get("hidden_act", "silu")),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            qk_norm=family.qk_norm,
            attention_bias=bias if family.attention_bias is None else family.attention_bias,
            output_bias=bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(config.get("mlp_bias")) if family.mlp_bias is None else family.mlp_bias,
            tied=bool(config.get("tie_word_embeddings", False)),
            init_std=float(config.get("initializer_range", 0.02)),
        )
    except ConversionError:
        raise
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config.json of the LLM: {error}") from error


def huggingface_config(config: DecoderConfig) -> dict[str, Any]:
    """Writes config.json in the dialect that transformers 4 and 5 both read.

    Raises ConversionError if no family has this combination of biases and norms.
    """
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _scaling(config.rope),
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    for model_type, family in FAMILIES.items():
        candidate = {
            "model_type": model_type,
            "architectures": [family.architecture],
            **written,
        }
        if decoder_config(candidate) == config:
            return candidate
    raise ConversionError(
        f"no supported family of Hugging Face has qk_norm={config.qk_norm}, attention_bias="
        f"{config.attention_bias}, output_bias={config.output_bias}, mlp_bias={config.mlp_bias}"
    )


def _family(config: Json) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConversionError(
            f"config.json of the LLM: model_type {model_type!r} is not supported; "
            f"choose among {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(model_type)]


def _check_attributes(config: Json) -> None:
    known = (*HANDLED, *IGNORED, *REFUSED)
    for key, value in config.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConversionError(
                f"config.json of the LLM: {key}={value!r} is not known here"
                + (f" (nearest: {near[0]})" if near else "")
                + ", so the model might compute something else"
            )
        if key in REFUSED and not REFUSED[key][1](value):
            raise ConversionError(f"config.json of the LLM: {key}={value!r}: {REFUSED[key][0]}")


def _required(config: Json, key: str) -> Any:
    if config.get(key) is None:
        raise ConversionError(f"config.json of the LLM: {key} is missing")
    return config[key]


def _rope(config: Json) -> RopeConfig:
    """Reads rope_parameters (transformers 5), else rope_theta and rope_scaling (4)."""
    block: Any = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(block, Mapping | None):
        raise ConversionError(f"config.json of the LLM: rotary settings {block!r} are no mapping")
    settings: dict[str, Any] = {**(block or {})}
    theta = settings.pop("rope_theta", config.get("rope_theta", 10000.0))
    kinds = {settings.pop(key, None) for key in ("rope_type", "type")} - {None}
    kind = str(kinds.pop()) if kinds else "default"
    if kinds or kind not in ROPE_SCALINGS:
        raise ConversionError(
            f"config.json of the LLM: rotary scaling {kind!r} is not supported; "
            f"choose among {', '.join(ROPE_SCALINGS)}"
        )
    scaling, fields = ROPE_SCALINGS[kind]
    if set(settings) != set(fields):
        differ = ", ".join(sorted(set(settings) ^ set(fields)))
        raise ConversionError(
            f"config.json of the LLM: rotary scaling {kind!r} takes "
            f"{', '.join(fields) or 'nothing'}; missing or not known: {differ}"
        )
    values = {ours: settings[theirs] for theirs, ours in fields.items()}
    return RopeConfig(theta=float(theta), scaling=scaling(**values) if scaling else None)


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    for kind, (scaling, fields) in ROPE_SCALINGS.items():
        if scaling is not None and type(rope.scaling) is scaling:
            values = {theirs: getattr(rope.scaling, ours) for theirs, ours in fields.items()}
            return {"rope_type": kind, **values}
    return None
