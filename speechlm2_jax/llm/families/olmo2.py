"""OLMo 2: norms behind attention and feed-forward, and over all heads of queries and keys."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common

NAMES = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def read_olmo(a: Attributes, *, theta: float = 10000.0, kind: str | None = None) -> Fields:
    """Reads what OLMo 2 and 3 have in common."""
    return (
        common(a, default_eps=1e-5)
        | attention_biases(a)
        | {"rope": a.rope(theta=theta, kind=kind), "block": "post", "qk_norm": "width"}
    )


FAMILY = Family(model_type="olmo2", architecture="Olmo2ForCausalLM", read=read_olmo, names=NAMES)
