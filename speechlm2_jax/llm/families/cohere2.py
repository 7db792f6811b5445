"""Command R7B and its kin (cohere2): parallel blocks; only layers with a window are rotated."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a Cohere2ForCausalLM."""
    fields = common(a, eps="layer_norm_eps", default_eps=1e-5, tied=True) | attention_biases(a)
    window = a.optional_size("sliding_window", 4096)
    every = a.size("sliding_window_pattern", 4)
    types = a.layer_types([SLIDING if (i + 1) % every else FULL for i in range(fields["layers"])])
    kinds = [
        LayerKind(window=window) if kind == SLIDING else LayerKind(has_rope=False) for kind in types
    ]
    return fields | {
        "pattern": pattern_of(kinds),
        "rope": a.rope(interleaved=True),
        "block": "parallel",
        "norm": "layer",
        "logit_scale": a.number("logit_scale", 0.0625, may_be_zero=False),
    }


FAMILY = Family(model_type="cohere2", architecture="Cohere2ForCausalLM", read=read)
