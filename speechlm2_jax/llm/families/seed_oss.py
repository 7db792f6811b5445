"""Seed-OSS: Llama with biases of query, key and value."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a SeedOssForCausalLM."""
    return common(a, head_width=128) | {
        "rope": a.rope(head_width=a.head_width(128)),
        "attention_bias": a.flag("attention_bias", default=True),
        "output_bias": a.flag("attention_out_bias"),
        "mlp_bias": a.flag("mlp_bias"),
    }


FAMILY = Family(model_type="seed_oss", architecture="SeedOssForCausalLM", read=read)
