"""Granite: Llama with four multipliers."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a GraniteForCausalLM."""

    def factor(key: str) -> float:
        return a.number(key, 1.0, may_be_zero=False)

    return (
        common(a)
        | attention_biases(a)
        | {
            "rope": a.rope(),
            "mlp_bias": a.flag("mlp_bias"),
            "embedding_scale": factor("embedding_multiplier"),
            "scales_all_inputs": True,
            "residual_scale": factor("residual_multiplier"),
            "attention_scale": factor("attention_multiplier"),
            "logit_scale": 1.0 / factor("logits_scaling"),
        }
    )


FAMILY = Family(model_type="granite", architecture="GraniteForCausalLM", read=read)
