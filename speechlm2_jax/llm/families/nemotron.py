"""Nemotron and Minitron: LayerNorm1P, squared ReLU without a gate, half of each head rotated."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a NemotronForCausalLM."""
    return (
        common(a, eps="norm_eps", default_eps=1e-5, activation="relu2", init_std=0.0134)
        | attention_biases(a)
        | {
            "rope": a.rope(part=0.5),
            "norm": "layer1p",
            "norm_bias": True,
            "gated": False,
            "mlp_bias": a.flag("mlp_bias"),
        }
    )


FAMILY = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    read=read,
    ignored={"rms_norm_eps": "NemotronForCausalLM reads norm_eps"},
)
