"""Llama (Touvron et al. 2023), and what follows it to the letter: SmolLM2, TinyLlama, Vicuna."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a LlamaForCausalLM."""
    return common(a) | attention_biases(a) | {"rope": a.rope(), "mlp_bias": a.flag("mlp_bias")}


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=read)
