"""Gemma 3, its text decoder: five layers with a window to each that attends to all."""

from collections.abc import Mapping

from speechlm2_jax.layers.rope import RopeConfig
from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.family import Family, Fields
from speechlm2_jax.llm.families.gemma import gemma_common
from speechlm2_jax.llm.families.gemma2 import NAMES, capping

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


def read(a: Attributes) -> Fields:
    """Reads config.json of a Gemma3ForCausalLM (model_type gemma3_text)."""
    fields = gemma_common(a, activation_key="hidden_activation")
    every = a.size("sliding_window_pattern", 6)
    window = a.optional_size("sliding_window", 4096)
    types = a.layer_types([SLIDING if (i + 1) % every else FULL for i in range(fields["layers"])])
    local = _local_rope(a, fields["head_width"])
    kinds = [
        LayerKind(window=window, rope=local) if kind == SLIDING else LayerKind() for kind in types
    ]
    return fields | {
        "block": "sandwich",
        "pattern": pattern_of(kinds),
        "qk_norm": "head",
        "rope": a.rope(theta=GLOBAL_THETA, kind=FULL, head_width=fields["head_width"]),
        "attention_scale": a.number("query_pre_attn_scalar", 256.0, may_be_zero=False) ** -0.5,
        "logit_softcap": capping(a, "final_logit_softcapping", None),
    }


def _local_rope(a: Attributes, head_width: int) -> RopeConfig:
    """Rotary positions of the layers with a window, which no rope_scaling changes."""
    theta = a.number("rope_local_base_freq", LOCAL_THETA, may_be_zero=False)
    blocks = a.get("rope_parameters")
    if isinstance(blocks, Mapping) and SLIDING in blocks:
        return a.rope(theta=theta, kind=SLIDING, head_width=head_width)
    return RopeConfig(theta=theta)


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read,
    names=NAMES,
    ignored={"hidden_act": "Gemma3ForCausalLM reads hidden_activation alone"},
)
