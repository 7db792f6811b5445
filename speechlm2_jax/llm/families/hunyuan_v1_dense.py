"""Hunyuan, the dense models: queries and keys are normed behind the rotation."""

from collections.abc import Mapping

from speechlm2_jax.layers.rope import RopeConfig
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.errors import ConfigError, finite
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a HunYuanDenseV1ForCausalLM."""
    return (
        common(a, default_eps=1e-5)
        | attention_biases(a)
        | {"rope": _rope(a), "qk_norm": "head_after_rope"}
    )


def _rope(a: Attributes) -> RopeConfig:
    """Rotary positions; a scaling "dynamic" with `alpha` stretches the base once and for all."""
    block = a.get("rope_parameters") or a.get("rope_scaling")
    if not isinstance(block, Mapping) or not block.get("alpha"):
        return a.rope()
    if (kind := block.get("rope_type") or block.get("type")) != "dynamic":
        raise ConfigError(f"alpha={block['alpha']} is for rotary scaling 'dynamic', not {kind!r}")
    width = a.head_width()
    theta = finite("rope_theta", block.get("rope_theta", a.get("rope_theta", 10000.0)))
    alpha = finite("alpha", block["alpha"], may_be_zero=False)
    return RopeConfig(theta=theta * alpha ** (width / (width - 2)))


FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    read=read,
    names={
        "attention.query_norm": "self_attn.query_layernorm",
        "attention.key_norm": "self_attn.key_layernorm",
    },
    ignored={
        "eod_token_id": "the tokenizer is read from its own files",
        "use_qk_norm": "HunYuanDenseV1ForCausalLM norms queries and keys, whatever the value",
        "use_cla": "HunYuanDenseV1ForCausalLM shares no keys between layers",
        "cla_share_factor": "HunYuanDenseV1ForCausalLM shares no keys between layers",
    },
)
