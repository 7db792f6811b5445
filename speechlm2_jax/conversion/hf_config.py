"""Hugging Face's config.json -> DecoderConfig, closed: nothing passes in silence.

Every attribute is read by its family, or changes nothing by the lists of `hf_keys`, or is an error:
the model might compute something else than what the network computes.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from speechlm2_jax.conversion import hf_keys, quantised
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.families import FAMILIES
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.errors import shown
from speechlm2_jax.llm.families.family import Family

Json = Mapping[str, Any]
WHERE = "config.json of the LLM"
ALWAYS_READ = frozenset({"model_type"})
DTYPE_KEYS = ("dtype", "torch_dtype")
NOT_TEXT_ALONE: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "mistral3": "ministral3",
    "llama4": "llama4_text",
    "qwen2_5_omni": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
}
"""model_type of a multimodal model -> that of the LLM inside."""
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Blocks of a multimodal model's config.json that describe the LLM inside."""
OTHER_INPUTS = frozenset({"vision_config", "audio_config", "vision_start_token_id"})
"""Keys that only multimodal models have."""


def decoder_config(config: Json) -> DecoderConfig:
    """Translates config.json.

    Raises ConversionError for an unsupported model_type, quantised weights, a size that is missing
    or absurd, and any attribute or value that the network would not honour; all of them at once.
    """
    quantised.check_config(config)
    family = family_of(config)
    attributes = Attributes(config)
    try:
        decoder = DecoderConfig(family=family.model_type, **family.read(attributes))
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{WHERE}: {error}") from error
    _check_rest(config, family, attributes.read | ALWAYS_READ, decoder)
    return decoder


def of_plain_weights(config: Json, dtype: str) -> dict[str, Any]:
    """config.json of the same model with weights that are plain numbers of `dtype`."""
    dropped = (*quantised.CONFIG_KEYS, *DTYPE_KEYS)
    # versions of transformers before 5 read torch_dtype alone
    return {k: v for k, v in config.items() if k not in dropped} | {"torch_dtype": dtype}


def family_of(config: Json) -> Family:
    """The family of a config.json. Raises ConversionError for one that is not supported."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    what = "is missing" if model_type is None else f"{shown(model_type)} is not supported"
    hint = _hint(config, str(model_type)) if isinstance(model_type, str) else ""
    raise ConversionError(f"{WHERE}: model_type {what}; choose among {', '.join(FAMILIES)}{hint}")


def _hint(config: Json, model_type: str) -> str:
    """What a model of an unknown type may be, and what is missing to run it."""
    inner: Json | None = next(
        (config[k] for k in TEXT_CONFIGS if isinstance(config.get(k), Mapping)), None
    )
    if model_type in NOT_TEXT_ALONE or inner is not None or OTHER_INPUTS & config.keys():
        own = NOT_TEXT_ALONE.get(model_type) or str((inner or {}).get("model_type"))
        which = f" ({own})" if own in FAMILIES else ""
        return f"; it is a model with further inputs: save its language model alone{which}"
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    if not near:
        return ""
    family = FAMILIES[near[0]]
    try:
        decoder_config({**config, "model_type": family.model_type})
    except ConversionError as error:
        missing = str(error).removeprefix(f"{WHERE}: ")
        return f"; the nearest is {family.model_type}, which is another model: {missing}"
    return (
        f"; the nearest is {family.model_type}: where the model computes the same, write "
        f"model_type {family.model_type} and its architecture {family.architecture}"
    )


def _check_rest(
    config: Json, family: Family, read: frozenset[str] | set[str], decoder: DecoderConfig
) -> None:
    """Raises ConversionError for attributes that nobody read and that may change the result."""
    problems: list[str] = []
    known = (*read, *hf_keys.NO_EFFECT, *hf_keys.BY_VALUE)
    for name, value in config.items():
        if name in read or name in family.ignored or value is None:  # null sets nothing
            continue
        key = hf_keys.find(name)
        if key is None:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(
                f"{name}={shown(value)} is not known here"
                + (f" (nearest: {near[0]})" if near else "")
                + ", so the model might compute something else; delete it if it computes nothing"
            )
        elif problem := key.problem(value, config, decoder):
            problems.append(f"{name}={shown(value)}: {problem}")
    if problems:
        raise ConversionError(f"{WHERE}: {'; '.join(problems)}")
