"""Qwen2 and Qwen2.5: Llama with biases of query, key and value."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.family import Family, Fields, common


def window_kinds(a: Attributes) -> Fields:
    """The first max_window_layers attend to all, the others within sliding_window, if it is on."""
    is_on = a.flag("use_sliding_window")
    window = a.optional_size("sliding_window", 4096)
    layers, first = a.size("num_hidden_layers"), a.get("max_window_layers", 28)
    sliding = [is_on and i >= first for i in range(layers)]
    types = a.layer_types([SLIDING if on else FULL for on in sliding])
    kinds = [LayerKind(window=window if kind == SLIDING else None) for kind in types]
    return {"pattern": pattern_of(kinds)}


def read(a: Attributes) -> Fields:
    """Reads config.json of a Qwen2ForCausalLM."""
    return common(a) | {"rope": a.rope(), "attention_bias": True} | window_kinds(a)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read,
    ignored={"attention_bias": "query, key and value have biases whatever the value"},
)
