"""Helium: Llama with rotary positions on neighbouring pairs."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a HeliumForCausalLM."""
    return common(a, default_eps=1e-8, head_width=128) | {
        "rope": a.rope(theta=100_000.0, interleaved=True, head_width=a.head_width(128)),
        "attention_bias": a.flag("attention_bias"),
        "mlp_bias": a.flag("mlp_bias"),
    }


FAMILY = Family(model_type="helium", architecture="HeliumForCausalLM", read=read)
