"""Apertus: xIELU without a gate, and a norm of each head's queries and keys."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common

DEFAULT_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def read(a: Attributes) -> Fields:
    """Reads config.json of an ApertusForCausalLM."""
    return (
        common(a, default_eps=1e-5, activation="xielu")
        | attention_biases(a)
        | {
            "rope": a.rope(theta=12_000_000.0, default=DEFAULT_SCALING),
            "gated": False,
            "mlp_bias": a.flag("mlp_bias"),
            "qk_norm": "head",
        }
    )


FAMILY = Family(
    model_type="apertus",
    architecture="ApertusForCausalLM",
    read=read,
    names={"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
    ignored={
        "post_norm": "ApertusForCausalLM norms before, whatever the value",
        "qk_norm": "ApertusForCausalLM norms queries and keys, whatever the value",
    },
)
