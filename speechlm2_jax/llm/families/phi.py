"""Phi-1, Phi-1.5 and Phi-2: parallel blocks, LayerNorm, biases everywhere."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.errors import ConfigError
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a PhiForCausalLM."""
    if a.flag("qk_layernorm"):
        raise ConfigError("qk_layernorm=True is not supported: no published Phi has it")
    fields = common(a, eps="layer_norm_eps", default_eps=1e-5, activation="gelu_new")
    biases = dict.fromkeys(("attention_bias", "output_bias", "mlp_bias"), True)
    return (
        fields
        | biases
        | {
            "rope": a.rope(part=0.5),
            "block": "parallel",
            "norm": "layer",
            "norm_bias": True,
            "gated": False,
            "head_bias": True,
        }
    )


FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    read=read,
    names={
        "attention.output": "self_attn.dense",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    },
    final_norm="final_layernorm",
    lora_targets=("q_proj", "v_proj", "fc1", "fc2"),
)
