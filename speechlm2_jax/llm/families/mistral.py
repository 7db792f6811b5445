"""Mistral: Llama, in the first version with a window over all layers."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a MistralForCausalLM.

    A config without sliding_window has the class's default, 4096; null is no window.
    """
    window = a.optional_size("sliding_window", None if "sliding_window" in a.config else 4096)
    return common(a) | {"rope": a.rope(), "pattern": (LayerKind(window=window),)}


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=read)
