"""Gemma 2: norms before and after, capped scores and logits, every other layer with a window."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.family import Family, Fields
from speechlm2_jax.llm.families.gemma import gemma_common

NAMES = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def read(a: Attributes) -> Fields:
    """Reads config.json of a Gemma2ForCausalLM."""
    fields = gemma_common(a, activation_key="hidden_activation")
    window = a.optional_size("sliding_window", 4096)
    types = a.layer_types([FULL if i % 2 else SLIDING for i in range(fields["layers"])])
    kinds = [LayerKind(window=window if kind == SLIDING else None) for kind in types]
    return fields | {
        "block": "sandwich",
        "pattern": pattern_of(kinds),
        "rope": a.rope(head_width=fields["head_width"]),
        "attention_scale": a.number("query_pre_attn_scalar", 256.0, may_be_zero=False) ** -0.5,
        "attention_softcap": capping(a, "attn_logit_softcapping", 50.0),
        "logit_softcap": capping(a, "final_logit_softcapping", 30.0),
    }


def capping(a: Attributes, key: str, default: float | None) -> float | None:
    """Reads a cap: missing means the default, null no cap."""
    return a.optional_number(key, None if key in a.config else default)


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=read,
    names=NAMES,
    ignored={"hidden_act": "Gemma2ForCausalLM reads hidden_activation alone"},
)
