"""NeMo's names of a whole SALM."""

from dataclasses import replace

from speechlm2_jax.conversion.decoder import (
    PEFT_PREFIX,
    TIED_COPIES_DIFFER,
    head_bias_rules,
    layers_table,
)
from speechlm2_jax.conversion.mapping import Rule, Table, aliases
from speechlm2_jax.conversion.perception import perception_table
from speechlm2_jax.conversion.transducer import transcribing_perception_table
from speechlm2_jax.networks.salm import SalmConfig


def salm_table(config: SalmConfig, *, automodel: bool = False) -> Table:
    """A SALM checkpoint: what NeMo's save_pretrained and Lightning write.

    NeMo's SALM moves the embedding out of the LLM to `embed_tokens`; SALMAutomodel (`automodel`)
    and other writers leave it in place, so both places are read. Tied, it is one tensor with the
    head. Its parameter name is that of the module that comes first: the head in a SALM.
    """
    llm = "llm." + (PEFT_PREFIX if config.lora and not automodel else "")
    outside, inside, head = (
        "embed_tokens.weight",
        f"{llm}model.embed_tokens.weight",
        f"{llm}lm_head.weight",
    )
    source, also = (inside, outside) if automodel else (outside, inside)
    embedding = Rule(source=source, target="llm.embedding.weight", also=(also,))
    if config.llm.tied:
        tied = replace(
            embedding,
            aliases=(head,),
            also=(also, "lm_head.weight"),
            parameter=None if automodel else head,
            where_copies_differ=TIED_COPIES_DIFFER,
        )
        ends = Table((tied,))
    else:
        output = Rule(source=head, target="llm.head.weight", also=("lm_head.weight",))
        ends = Table((embedding, output))
    ends += Table(tuple(head_bias_rules(config.llm, llm, "llm.")))
    layers = layers_table(config.llm, config.lora).prefixed(source=llm, target="llm.")
    speech = (
        perception_table(config.perception)
        if config.asr is None
        else transcribing_perception_table(config.perception, config.asr)
    )
    return ends + layers + speech.prefixed(source="perception.", target="perception.")


def tied_aliases(config: SalmConfig) -> dict[str, str]:
    """Names that NeMo gives a tensor besides the written one: metadata of the safetensors file."""
    return aliases(salm_table(config))
