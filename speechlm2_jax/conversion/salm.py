"""NeMo's names of a whole SALM."""

from speechlm2_jax.conversion.decoder import (
    PEFT_PREFIX,
    TIED_COPIES_DIFFER,
    head_bias_rules,
    layers_table,
)
from speechlm2_jax.conversion.mapping import Rule, Table, aliases
from speechlm2_jax.conversion.perception import perception_table
from speechlm2_jax.networks.salm import SalmConfig


def salm_table(config: SalmConfig) -> Table:
    """A SALM checkpoint: what NeMo's save_pretrained and Lightning write.

    NeMo moves the embedding out of the LLM to `embed_tokens`; other writers left it in place, so
    both places are read. Tied, it is one tensor with the head, whose parameter name is the head's.
    """
    llm = "llm." + (PEFT_PREFIX if config.lora else "")
    inside, head = f"{llm}model.embed_tokens.weight", f"{llm}lm_head.weight"
    if config.llm.tied:
        embedding = Rule(
            source="embed_tokens.weight",
            target="llm.embedding.weight",
            aliases=(head,),
            also=(inside, "lm_head.weight"),
            parameter=head,
            where_copies_differ=TIED_COPIES_DIFFER,
        )
        ends = Table((embedding,))
    else:
        ends = Table(
            (
                Rule(source="embed_tokens.weight", target="llm.embedding.weight", also=(inside,)),
                Rule(source=head, target="llm.head.weight", also=("lm_head.weight",)),
            )
        )
    ends += Table(tuple(head_bias_rules(config.llm, llm, "llm.")))
    layers = layers_table(config.llm, config.lora).prefixed(source=llm, target="llm.")
    speech = perception_table(config.perception)
    return ends + layers + speech.prefixed(source="perception.", target="perception.")


def tied_aliases(config: SalmConfig) -> dict[str, str]:
    """Names that NeMo gives a tensor besides the written one: metadata of the safetensors file."""
    return aliases(salm_table(config))
