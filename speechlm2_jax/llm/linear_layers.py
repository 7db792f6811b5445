"""The linear layers of an LLM by the names of its family, and which of them LoRA adapts."""

from dataclasses import replace

from speechlm2_jax.layers.automodel_lora import AutomodelLoraConfig
from speechlm2_jax.layers.lora import ALL, LoraConfig
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.families import FAMILIES


def linear_layers(config: DecoderConfig) -> dict[str, bool]:
    """Linear layers inside a decoder layer, by their paths here -> whether they have a bias."""
    inputs = ("qkv",) if config.fused_qkv else ("query", "key", "value")
    gates = ("gate",) if config.gated else ()
    inner = ("gate_up",) if config.fused_gate_up else (*gates, "up")
    return {
        **{f"attention.{name}": config.attention_bias for name in inputs},
        "attention.output": config.output_bias,
        **{f"mlp.{name}": config.mlp_bias for name in (*inner, "down")},
    }


def fit_lora(lora: LoraConfig, config: DecoderConfig) -> LoraConfig:
    """Gives `lora` the target_modules that name layers of this LLM, as PEFT matches them.

    Without target_modules they are PEFT's for the family. Raises ValueError if no name matches.
    """
    names = _layer_names(config)
    if lora.target_modules == ALL:
        return replace(lora, target_modules=tuple(_last(name) for name in names))
    given = _given(lora, config)
    fitting = tuple(name for name in given if _matches(lora, name, names))
    if isinstance(lora, AutomodelLoraConfig):  # its patterns become names
        adapted = [name for name in names if any(lora.adapts(own, name) for own in fitting)]
        fitting = tuple(map(_last, adapted))
    if not fitting:
        raise ValueError(
            f"lora.target_modules: {', '.join(given)} name no layer of this LLM "
            f"({config.family}); it has {', '.join(map(_last, names))}"
        )
    return replace(lora, target_modules=fitting)


def lora_note(lora: LoraConfig, config: DecoderConfig) -> str | None:
    """A line about target_modules that name no layer of this LLM; None if all do.

    PEFT, and so NeMo, leaves them out without a word if another name matches.
    """
    names = _layer_names(config)
    given = () if lora.target_modules == ALL else _given(lora, config)
    missing = [name for name in given if not _matches(lora, name, names)]
    if not missing:
        return None
    return (
        f"lora.target_modules: {', '.join(missing)} name no layer of this LLM ({config.family}) "
        f"and are left out; it has {', '.join(map(_last, names))}"
    )


def _given(lora: LoraConfig, config: DecoderConfig) -> tuple[str, ...]:
    given = lora.target_modules
    if given is None:
        return FAMILIES[config.family].lora_targets
    return (given,) if isinstance(given, str) else given


def _layer_names(config: DecoderConfig) -> list[str]:
    name_of = FAMILIES[config.family].name_of
    return [name_of(module) for module in linear_layers(config)]


def _matches(lora: LoraConfig, given: str, names: list[str]) -> bool:
    return any(lora.adapts(given, name) for name in names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
