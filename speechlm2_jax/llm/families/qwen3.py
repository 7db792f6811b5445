"""Qwen3: Llama with a norm of each head's queries and keys."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common
from speechlm2_jax.llm.families.qwen2 import window_kinds


def read(a: Attributes) -> Fields:
    """Reads config.json of a Qwen3ForCausalLM."""
    return (
        common(a, head_width=128)
        | attention_biases(a)
        | {"rope": a.rope(head_width=a.head_width(128)), "qk_norm": "head"}
        | window_kinds(a)
    )


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=read)
