"""Phi-3 and Phi-4-mini: query, key and value are one layer, and so are gate and up."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a Phi3ForCausalLM. "su" and "yarn" are older names of longrope."""
    window = a.optional_size("sliding_window")
    aliases = {"su": "longrope", "yarn": "longrope"}
    return common(a, default_eps=1e-5) | {
        "pattern": (LayerKind(window=window),),
        "rope": a.rope(part=1.0, aliases=aliases),
        "fused_qkv": True,
        "fused_gate_up": True,
    }


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=read,
    lora_targets=("qkv_proj",),
    ignored={
        "attention_bias": "no projection of Phi3ForCausalLM has a bias",
        "mlp_bias": "no projection of Phi3ForCausalLM has a bias",
    },
)
