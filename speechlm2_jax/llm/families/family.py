"""What one Hugging Face model_type is: how its config.json is read, how its weights are named."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from speechlm2_jax.llm.families.attributes import Attributes

Fields = dict[str, Any]
"""Fields of a DecoderConfig."""

LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.qkv": "self_attn.qkv_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.gate_up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
        "mlp.xielu": "mlp.act_fn",
    }
)
"""Our module inside a layer -> Llama's, from which the other families differ in places."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type of Hugging Face. See docs/llm.md for how to add one."""

    model_type: str
    architecture: str
    """The class that transformers saves and loads it with."""
    read: Callable[[Attributes], Fields]
    """Reads config.json. An attribute that it does not ask for must be in the lists of
    `known_keys`, or in `ignored`, or is refused."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our modules inside a layer whose names differ from Llama's."""
    final_norm: str = "norm"
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """PEFT's layers where target_modules names none."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Attributes that change nothing in this family -> why."""

    def name_of(self, module: str) -> str:
        """Returns the checkpoint's name of one of our modules inside a layer."""
        return self.names[module] if module in self.names else LLAMA_NAMES[module]


def common(
    a: Attributes,
    *,
    eps: str = "rms_norm_eps",
    default_eps: float = 1e-6,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    head_width: int | None = None,
    tied: bool = False,
    init_std: float = 0.02,
) -> Fields:
    """Reads what nearly all families have. Arguments are the family's names and defaults."""
    heads = a.size("num_attention_heads")
    return {
        "vocab_size": a.size("vocab_size"),
        "width": a.size("hidden_size"),
        "layers": a.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": a.size("num_key_value_heads", heads),
        "head_width": a.head_width(head_width),
        "mlp_width": a.size("intermediate_size"),
        "activation": a.word(activation_key, activation),
        "norm_eps": a.number(eps, default_eps),
        "tied": a.flag("tie_word_embeddings", tied),
        "init_std": a.number("initializer_range", init_std),
    }


def attention_biases(a: Attributes, default: bool = False) -> Fields:
    """Reads attention_bias, which is for all four projections."""
    bias = a.flag("attention_bias", default)
    return {"attention_bias": bias, "output_bias": bias}
