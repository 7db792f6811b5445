"""Gemma (Gemma Team 2024): norms with 1 + weight, embeddings times the root of the width."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def gemma_common(a: Attributes, *, activation_key: str) -> Fields:
    """Reads what all Gemmas have.

    Only text embeddings are scaled. Audio enters the layers as it is, as in transformers since 5.4.
    """
    fields = common(
        a,
        activation="gelu_pytorch_tanh",
        activation_key=activation_key,
        head_width=256,
        tied=True,
    )
    scale = {"norm": "rms1p", "embedding_scale": fields["width"] ** 0.5}
    return fields | attention_biases(a) | scale


def read(a: Attributes) -> Fields:
    """Reads config.json of a GemmaForCausalLM.

    Its hidden_act "gelu" means the tanh approximation: the first releases wrote it so.
    """
    fields = gemma_common(a, activation_key="hidden_act")
    if fields["activation"] == "gelu":
        fields["activation"] = "gelu_pytorch_tanh"
    return fields | {"rope": a.rope(head_width=fields["head_width"])}


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read=read,
    ignored={"hidden_activation": "GemmaForCausalLM reads hidden_act alone"},
)
