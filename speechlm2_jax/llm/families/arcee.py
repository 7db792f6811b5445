"""Arcee AFM: Llama with squared ReLU and no gate."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of an ArceeForCausalLM."""
    return (
        common(a, default_eps=1e-5, activation="relu2")
        | attention_biases(a)
        | {"rope": a.rope(), "gated": False, "mlp_bias": a.flag("mlp_bias")}
    )


FAMILY = Family(model_type="arcee", architecture="ArceeForCausalLM", read=read)
