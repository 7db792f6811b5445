"""NeMo's names of a duplex speech-to-text model, and what it starts from of an LLM."""

from dataclasses import replace

from speechlm2_jax.conversion.decoder import PEFT_PREFIX, decoder_table, layers_table
from speechlm2_jax.conversion.duplex import end_rules
from speechlm2_jax.conversion.mapping import Ignored, Rule, Table
from speechlm2_jax.conversion.perception import perception_table
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.networks.duplex_stt import DuplexSttConfig

USER_EMBEDDING = "user_embedding.weight"
USER_HEAD = "user_head."


def duplex_stt_table(config: DuplexSttConfig) -> Table:
    """A checkpoint as NeMo's save_pretrained and Lightning write it."""
    wrapped = PEFT_PREFIX if config.lora else ""
    table = Table((*end_rules(config.llm, wrapped), *_user_rules(config)))
    layers = layers_table(config.llm, config.lora, root="")
    table += layers.prefixed(source=f"llm.{wrapped}", target="llm.")
    speech = perception_table(config.perception)
    return table + speech.prefixed(source="perception.", target="perception.")


def user_text_table(config: DecoderConfig) -> Table:
    """What the user's channel starts from in an LLM: copies of its embedding and its head."""
    targets = {"embedding.weight": USER_EMBEDDING, "head.weight": f"{USER_HEAD}weight"}
    targets |= {name: f"{USER_HEAD}bias" for name in ("head.bias", "head_bias")}
    table = decoder_table(config)
    rules = [
        replace(rule, target=targets[rule.target]) for rule in table.rules if rule.target in targets
    ]
    if config.tied:
        (embedding,) = (rule for rule in rules if rule.target == USER_EMBEDDING)
        rules.append(replace(embedding, target=f"{USER_HEAD}weight"))
    return Table(tuple(rules), (Ignored(r".*", "the user's channel starts from both ends only"),))


def _user_rules(config: DuplexSttConfig) -> tuple[Rule, ...]:
    if not config.has_user_text:
        return ()
    bias = (Rule(source="asr_head.bias", target=f"{USER_HEAD}bias"),)
    return (
        Rule(source="embed_asr_tokens.weight", target=USER_EMBEDDING),
        Rule(source="asr_head.weight", target=f"{USER_HEAD}weight"),
        *(bias if config.llm.head_bias else ()),
    )
