"""ERNIE 4.5, the dense models: Llama with rotary positions on neighbouring pairs."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of an Ernie4_5ForCausalLM."""
    bias = a.flag("use_bias")
    return common(a, default_eps=1e-5, head_width=128, tied=True) | {
        "rope": a.rope(theta=500_000.0, interleaved=True, head_width=a.head_width(128)),
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


FAMILY = Family(model_type="ernie4_5", architecture="Ernie4_5ForCausalLM", read=read)
