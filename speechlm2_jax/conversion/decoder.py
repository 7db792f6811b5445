"""Hugging Face's names of a decoder LLM (Llama, Qwen2, Qwen3), plain or wrapped by PEFT's LoRA."""

from speechlm2_jax.conversion.mapping import LAYER, Ignored, Rule, Table
from speechlm2_jax.layers.lora import TARGET_NAMES, LoraConfig
from speechlm2_jax.llm.config import DecoderConfig

PEFT_PREFIX = "base_model.model."
BLOCKS = {
    **dict.fromkeys(("query", "key", "value", "output"), ("attention", "self_attn")),
    **dict.fromkeys(("gate", "up", "down"), ("mlp", "mlp")),
}
"""Our linear layer -> the block it is in, ours and Hugging Face's."""
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}
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
    adapted: frozenset[str] = lora.targets if lora else frozenset()
    rules = [Rule(source="norm.weight", target="norm.weight")]
    for ours, theirs in NORMS.items():
        rules.append(_layer(f"{theirs}.weight", f"{ours}.weight"))
    if config.qk_norm:
        for ours, theirs in HEAD_NORMS.items():
            rules.append(_layer(f"self_attn.{theirs}.weight", f"attention.{ours}.weight"))
    for foreign, name in TARGET_NAMES.items():
        block, foreign_block = BLOCKS[name]
        rules += _linear(
            f"{foreign_block}.{foreign}",
            f"{block}.{name}",
            bias=_has_bias(config, name),
            lora=name in adapted,
        )
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
    return (Table(tuple(rules)) + layers_table(config)).also_without("model.")


def _has_bias(config: DecoderConfig, name: str) -> bool:
    if BLOCKS[name][0] == "mlp":
        return config.mlp_bias
    return config.output_bias if name == "output" else config.attention_bias


def _layer(source: str, target: str) -> Rule:
    return Rule(source=f"layers.{LAYER}.{source}", target=f"layers.{target}")


def _linear(source: str, target: str, *, bias: bool, lora: bool) -> list[Rule]:
    base = f"{source}.base_layer" if lora else source
    rules = [_layer(f"{base}.weight", f"{target}.weight")]
    if bias:
        rules.append(_layer(f"{base}.bias", f"{target}.bias"))
    if lora:
        rules.append(_layer(f"{source}.lora_A.default.weight", f"{target}.lora_a"))
        rules.append(_layer(f"{source}.lora_B.default.weight", f"{target}.lora_b"))
    return rules
