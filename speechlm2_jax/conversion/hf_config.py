"""Hugging Face's config.json <-> DecoderConfig, closed on both sides.

Every attribute is read, or changes nothing by the lists of `hf_keys`, or is an error: a setting
that the network does not honour must not pass in silence. Both dialects are read: transformers 4
(`rope_theta` + `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`).
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from speechlm2_jax.conversion import hf_keys, quantised
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.layers.rope import LinearScaling, Llama3Scaling, RopeConfig
from speechlm2_jax.llm.config import DecoderConfig

Json = Mapping[str, Any]
WHERE = "config.json of the LLM"
MAX_SHOWN = 80
LARGEST = MappingProxyType(
    {
        "vocab_size": 1 << 26,
        "hidden_size": 1 << 20,
        "num_hidden_layers": 1 << 12,
        "num_attention_heads": 1 << 16,
        "num_key_value_heads": 1 << 16,
        "head_dim": 1 << 16,
        "intermediate_size": 1 << 22,
    }
)
"""Sizes beyond these are mistakes: building such a network would fill any memory."""

HANDLED = frozenset(
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim intermediate_size hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters "
    "tie_word_embeddings initializer_range attention_bias mlp_bias".split()
)
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
    """Defaults of a model_type for keys that its config.json lacks."""

    qk_norm: bool = False
    attention_bias: bool | None = None
    """Biases of query, key and value; None: the value in config.json."""
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

    Raises ConversionError for an unsupported model_type, quantised weights, a size that is missing
    or absurd, and any attribute or value that the network would not honour; all of them at once.
    """
    quantised.check_config(config)
    family = _family(config)
    _check_attributes(config)
    heads = _size(config, "num_attention_heads")
    width = _size(config, "hidden_size")
    bias = bool(config.get("attention_bias") or False)
    try:
        return DecoderConfig(
            vocab_size=_size(config, "vocab_size"),
            width=width,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads),
            head_width=_size(config, "head_dim", family.head_dim or width // heads),
            mlp_width=_size(config, "intermediate_size"),
            activation=str(config.get("hidden_act") or "silu"),
            norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config),
            qk_norm=family.qk_norm,
            attention_bias=bias if family.attention_bias is None else family.attention_bias,
            output_bias=bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(config.get("mlp_bias")) if family.mlp_bias is None else family.mlp_bias,
            tied=bool(config.get("tie_word_embeddings") or False),
            init_std=_number(config, "initializer_range", 0.02),
        )
    except ConversionError:
        raise
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{WHERE}: {error}") from error


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
            f"{WHERE}: model_type {model_type!r} is not supported; "
            f"choose among {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(model_type)]


def _check_attributes(config: Json) -> None:
    problems: list[str] = []
    known = (*HANDLED, *hf_keys.NO_EFFECT, *hf_keys.BY_VALUE)
    for name, value in config.items():
        if name in HANDLED or value is None:  # null sets nothing
            continue
        key = hf_keys.find(name)
        if key is None:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(
                f"{name}={_shown(value)} is not known here"
                + (f" (nearest: {near[0]})" if near else "")
                + ", so the model might compute something else; delete it if it computes nothing"
            )
        elif problem := key.problem(value, config):
            problems.append(f"{name}={_shown(value)}: {problem}")
    if problems:
        raise ConversionError(f"{WHERE}: {'; '.join(problems)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _size(config: Json, key: str, default: int | None = None) -> int:
    """A whole number within the bounds of any LLM; missing and null mean the default."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise ConversionError(f"{WHERE}: {key} is missing")
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConversionError(f"{WHERE}: {key}={_shown(value)} should be a whole number")
    if not 1 <= value <= LARGEST[key]:
        raise ConversionError(
            f"{WHERE}: {key}={_shown(value)} is not a size of an LLM (1 to {LARGEST[key]})"
        )
    return value


def _number(config: Json, key: str, default: float, *, may_be_zero: bool = True) -> float:
    """A finite number that is not negative; missing and null mean the default."""
    value = config.get(key)
    if value is None:
        return default
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    is_sound = math.isfinite(number) and (number > 0 or (may_be_zero and number == 0))
    if isinstance(value, bool) or not is_sound:
        bound = "" if may_be_zero else " above 0"
        raise ConversionError(f"{WHERE}: {key}={_shown(value)} should be a finite number{bound}")
    return number


def _rope(config: Json) -> RopeConfig:
    """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (4).

    Raises ConversionError where both are there and mean different rotations: versions of
    transformers differ in which of them they take.
    """
    blocks: list[Json] = []
    for block in (config.get("rope_parameters"), config.get("rope_scaling")):
        if not isinstance(block, Mapping | None):
            raise ConversionError(f"{WHERE}: rotary settings {_shown(block)} are no mapping")
        blocks.append({**(block or {})})
    new, old = blocks
    theta = new.get("rope_theta", config.get("rope_theta"))
    rope = _rope_of(new or old, config.get("rope_theta"))
    if new and old and _rope_of(old, theta) != rope:
        raise ConversionError(
            f"{WHERE}: rope_parameters {_shown(new)} and rope_scaling {_shown(old)} differ; delete "
            "the one that does not apply"
        )
    return rope


def _rope_of(block: Mapping[str, Any], default_theta: Any) -> RopeConfig:
    """Reads one block of rotary settings."""
    settings: dict[str, Any] = {**block}
    merged = {"rope_theta": default_theta, **settings}
    theta = _number(merged, "rope_theta", 10000.0, may_be_zero=False)
    settings.pop("rope_theta", None)
    kinds = {settings.pop(key, None) for key in ("rope_type", "type")} - {None}
    kind = str(kinds.pop()) if kinds else "default"
    if kinds or kind not in ROPE_SCALINGS:
        raise ConversionError(
            f"{WHERE}: rotary scaling {kind!r} is not supported; "
            f"choose among {', '.join(ROPE_SCALINGS)}"
        )
    scaling, fields = ROPE_SCALINGS[kind]
    given = {k: v for k, v in settings.items() if k in fields or not _unused(k, v, kind)}
    if set(given) != set(fields):
        differ = ", ".join(sorted(set(given) ^ set(fields)))
        raise ConversionError(
            f"{WHERE}: rotary scaling {kind!r} takes "
            f"{', '.join(fields) or 'nothing'}; missing or not known: {differ}"
        )
    values = {
        ours: _number(given, theirs, math.nan, may_be_zero=False) for theirs, ours in fields.items()
    }
    if values.get("original_positions"):
        values["original_positions"] = int(values["original_positions"])
    try:
        return RopeConfig(theta=theta, scaling=scaling(**values) if scaling else None)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{WHERE}: rotary scaling {kind!r}: {error}") from error


def _unused(key: str, value: Any, kind: str) -> bool:
    """Whether a key of the rotary settings changes nothing by its value, or under this kind."""
    if value is None or (key == "partial_rotary_factor" and value == 1):
        return True
    if key == "factor":
        return kind == "default" and value == 1
    return key == "original_max_position_embeddings" and kind in ("default", "linear")


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    for kind, (scaling, fields) in ROPE_SCALINGS.items():
        if scaling is not None and type(rope.scaling) is scaling:
            values = {theirs: getattr(rope.scaling, ours) for theirs, ours in fields.items()}
            return {"rope_type": kind, **values}
    return None
