"""GLM-4 (glm): half of each head rotated, in neighbouring pairs; gate and up are one layer."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a GlmForCausalLM or a Glm4ForCausalLM."""
    head_width = a.head_width(128)
    return common(a, default_eps=1.5625e-7, head_width=128) | {
        "rope": a.rope(part=0.5, interleaved=True, head_width=head_width),
        "attention_bias": a.flag("attention_bias", default=True),
        "fused_gate_up": True,
    }


FAMILY = Family(model_type="glm", architecture="GlmForCausalLM", read=read)
