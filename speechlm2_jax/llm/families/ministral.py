"""Ministral: Mistral whose layers say one by one whether they have a window."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a MinistralForCausalLM."""
    fields = common(a)
    window = a.optional_size("sliding_window", None if "sliding_window" in a.config else 4096)
    default = FULL if window is None else SLIDING
    types = a.layer_types([default] * fields["layers"])
    kinds = [LayerKind(window=window if kind == SLIDING else None) for kind in types]
    return fields | {"rope": a.rope(), "pattern": pattern_of(kinds)}


FAMILY = Family(model_type="ministral", architecture="MinistralForCausalLM", read=read)
