"""Ministral 3: Mistral with YaRN, whose queries grow with the logarithm of their position."""

from collections.abc import Mapping

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.errors import ConfigError, finite
from speechlm2_jax.llm.families.family import Family, Fields, common

BETA = "llama_4_scaling_beta"


def read(a: Attributes) -> Fields:
    """Reads config.json of a Ministral3ForCausalLM."""
    window = a.optional_size("sliding_window")
    block = a.get("rope_parameters")
    if not isinstance(block, Mapping) or BETA not in block:
        raise ConfigError(f"rope_parameters should be a mapping that has {BETA}")
    positions = finite("original positions", block.get("original_max_position_embeddings"))
    return common(a, default_eps=1e-5, head_width=128) | {
        "pattern": (LayerKind(window=window),),
        "rope": a.rope(
            theta=1_000_000.0,
            head_width=a.head_width(128),
            others=(BETA, "max_position_embeddings"),
        ),
        "query_growth": finite(BETA, block[BETA]),
        "query_growth_positions": int(positions),
    }


FAMILY = Family(model_type="ministral3", architecture="Ministral3ForCausalLM", read=read)
