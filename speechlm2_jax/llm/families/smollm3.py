"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.errors import ConfigError, shown
from speechlm2_jax.llm.families.family import Family, Fields, attention_biases, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a SmolLM3ForCausalLM."""
    fields = common(a, tied=True) | attention_biases(a)
    layers = fields["layers"]
    every = a.size("no_rope_layer_interval", 4)
    rotated = a.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if not isinstance(rotated, list) or len(rotated) != layers:
        raise ConfigError(f"no_rope_layers={shown(rotated)} should be a list of {layers} flags")
    window = a.optional_size("sliding_window") if a.flag("use_sliding_window") else None
    a.get("sliding_window")
    types = a.layer_types([FULL if on or window is None else SLIDING for on in rotated])
    kinds = [
        LayerKind(window=window if kind == SLIDING else None, has_rope=bool(on))
        for kind, on in zip(types, rotated, strict=True)
    ]
    return fields | {
        "pattern": pattern_of(kinds),
        "rope": a.rope(theta=2_000_000.0),
        "mlp_bias": a.flag("mlp_bias"),
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=read,
    ignored={"max_window_layers": "SmolLM3ForCausalLM reads layer_types"},
)
