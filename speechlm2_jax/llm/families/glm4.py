"""GLM-4-0414: GLM with norms before and after attention and feed-forward."""

from speechlm2_jax.llm.families import glm
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields


def read(a: Attributes) -> Fields:
    """Reads config.json of a Glm4ForCausalLM."""
    return glm.read(a) | {"block": "sandwich"}


FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    read=read,
    names={
        "attention_post_norm": "post_self_attn_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    },
)
