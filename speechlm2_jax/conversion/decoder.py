"""Hugging Face's names of a decoder LLM of any family, plain or wrapped by PEFT's LoRA."""

from collections.abc import Iterator
from dataclasses import replace

from speechlm2_jax.conversion.mapping import LAYER, Ignored, Rule, Table
from speechlm2_jax.layers.activations import XIELU
from speechlm2_jax.layers.automodel_lora import AutomodelLoraConfig
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.families import FAMILIES
from speechlm2_jax.llm.linear_layers import linear_layers

PEFT_PREFIX = "base_model.model."
TIED_COPIES_DIFFER = (
    "the LLM's config.json has tie_word_embeddings: true; write false to use both, or delete from "
    "the file the one that is not meant"
)
NO_HEAD = (
    "a model that was saved without its head (AutoModel) cannot generate: save it as "
    "AutoModelForCausalLM, or write tie_word_embeddings: true where the embedding is its head"
)
IGNORED = (
    Ignored(
        r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\."
        r"(?:inv_freq|original_inv_freq|cos_cached|sin_cached)",
        "rotary frequencies that some versions stored; computed here, as in transformers",
    ),
)


def layers_table(
    config: DecoderConfig, lora: LoraConfig | None = None, root: str = "model."
) -> Table:
    """Everything between the embedding and the head, below `root` of the checkpoint."""
    family, period = FAMILIES[config.family], len(config.pattern)
    rules = [
        Rule(source=f"{family.final_norm}.{name}", target=f"norm.{name}")
        for name in _norm_parts(config)
    ]
    layer = tuple(_layer_rules(config, lora))
    whole = config.repeats * period
    for place in range(period if config.repeats else 0):
        inner = "" if period == 1 else f"{place}."
        numbers = None if period == 1 else range(place, whole, period)
        rules += [_placed(rule, f"layers.{inner}", numbers) for rule in layer]
    for place in range(config.remainder):
        number = range(whole + place, whole + place + 1)
        rules += [_placed(rule, f"remainder.{place}.", number) for rule in layer]
    return Table(tuple(rules)).prefixed(source=root) + Table((), IGNORED)


def decoder_table(config: DecoderConfig) -> Table:
    """A whole Hugging Face directory without LoRA, saved with the head's class or without it."""
    tied = ("lm_head.weight",) if config.tied else ()
    rules = [
        Rule(
            source="model.embed_tokens.weight",
            target="embedding.weight",
            aliases=tied,
            where_copies_differ=TIED_COPIES_DIFFER,
        ),
    ]
    if not config.tied:
        head = Rule(source="lm_head.weight", target="head.weight", where_missing=NO_HEAD)
        rules.append(head)
    rules += head_bias_rules(config)
    return (Table(tuple(rules)) + layers_table(config)).also_without("model.")


def head_bias_rules(config: DecoderConfig, source: str = "", target: str = "") -> list[Rule]:
    """The rule of the output layer's bias, below `source` and `target`; none without a bias."""
    variable = "head_bias" if config.tied else "head.bias"
    rule = Rule(source=f"{source}lm_head.bias", target=f"{target}{variable}")
    return [rule] if config.head_bias else []


def _layer_rules(config: DecoderConfig, lora: LoraConfig | None) -> Iterator[Rule]:
    """The rules of one layer, with names as they are inside it."""
    name_of = FAMILIES[config.family].name_of
    for norm, is_there in _norms(config).items():
        for part in _norm_parts(config) if is_there else ():
            yield Rule(source=f"{name_of(norm)}.{part}", target=f"{norm}.{part}")
    adapted: frozenset[str] = lora.targets if lora else frozenset()
    # Automodel patches a linear layer in place, PEFT wraps it
    is_patched = isinstance(lora, AutomodelLoraConfig)
    matrix = "weight" if is_patched else "default.weight"
    for module, bias in linear_layers(config).items():
        foreign, has_adapter = name_of(module), module.rpartition(".")[2] in adapted
        base = f"{foreign}.base_layer" if has_adapter and not is_patched else foreign
        yield Rule(source=f"{base}.weight", target=f"{module}.weight")
        if bias:
            yield Rule(source=f"{base}.bias", target=f"{module}.bias")
        if has_adapter:
            yield Rule(source=f"{foreign}.lora_A.{matrix}", target=f"{module}.lora_a")
            yield Rule(source=f"{foreign}.lora_B.{matrix}", target=f"{module}.lora_b")
    if config.activation == XIELU:
        for part in ("alpha_p", "alpha_n", "beta", "eps"):
            yield Rule(source=f"{name_of('mlp.xielu')}.{part}", target=f"mlp.xielu.{part}")


def _norms(config: DecoderConfig) -> dict[str, bool]:
    """Norms of a layer -> whether it has them."""
    has_before, has_after = config.block != "post", config.block in ("post", "sandwich")
    return {
        "attention_norm": has_before,
        "mlp_norm": has_before and config.block != "parallel",
        "attention_post_norm": has_after,
        "mlp_post_norm": has_after,
        "attention.query_norm": config.qk_norm != "none",
        "attention.key_norm": config.qk_norm != "none",
    }


def _norm_parts(config: DecoderConfig) -> tuple[str, ...]:
    return ("weight", "bias") if config.norm_bias else ("weight",)


def _placed(rule: Rule, target: str, numbers: range | None) -> Rule:
    source = f"layers.{LAYER}.{rule.source}"
    return replace(rule, source=source, target=target + rule.target, numbers=numbers)
