"""OLMo 3: OLMo 2 in which three of four layers have a window."""

from collections.abc import Mapping
from dataclasses import replace

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.family import Family, Fields
from speechlm2_jax.llm.families.olmo2 import NAMES, read_olmo

THETA = 500_000.0


def read(a: Attributes) -> Fields:
    """Reads config.json of an Olmo3ForCausalLM. A rope_scaling is for full attention alone."""
    fields = read_olmo(a, theta=THETA, kind=FULL)
    window = a.optional_size("sliding_window", 4096)
    types = a.layer_types([SLIDING if (i + 1) % 4 else FULL for i in range(fields["layers"])])
    blocks = a.get("rope_parameters")
    nested = isinstance(blocks, Mapping) and SLIDING in blocks
    local = a.rope(theta=THETA, kind=SLIDING) if nested else replace(fields["rope"], scaling=None)
    own = None if local == fields["rope"] else local
    kinds = [
        LayerKind(window=window, rope=own) if kind == SLIDING else LayerKind() for kind in types
    ]
    return fields | {"pattern": pattern_of(kinds)}


FAMILY = Family(model_type="olmo3", architecture="Olmo3ForCausalLM", read=read, names=NAMES)
