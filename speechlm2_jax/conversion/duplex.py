"""NeMo's names of a whole duplex model, and of its codec alone."""

from speechlm2_jax.conversion.codec import codec_table
from speechlm2_jax.conversion.decoder import (
    PEFT_PREFIX,
    TIED_COPIES_DIFFER,
    head_bias_rules,
    layers_table,
)
from speechlm2_jax.conversion.mapping import LAYER, Rule, Table
from speechlm2_jax.conversion.perception import perception_table
from speechlm2_jax.conversion.speech_decoder import speech_decoder_table
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.networks.duplex import DuplexConfig

CODEC = "audio_codec."
SPEECH_DECODER = "speech_generation."


def duplex_table(config: DuplexConfig) -> Table:
    """A duplex checkpoint: what NeMo's save_pretrained and Lightning write.

    NeMo takes the embedding and the head out of the LLM; tied, they are one tensor, whose parameter
    is the head's.
    """
    wrapped = PEFT_PREFIX if config.lora else ""
    table = Table(
        (
            *end_rules(config.llm, wrapped),
            Rule(source=f"embed_audio_tokens.{LAYER}.weight", target="code_embedding.weight"),
            Rule(source="audio_head.weight", target="audio_head.weight"),
            Rule(source="audio_head.bias", target="audio_head.bias"),
            Rule(source="_control_codes", target="control_codes"),
        )
    )
    layers = layers_table(config.llm, config.lora, root="")
    table += layers.prefixed(source=f"llm.{wrapped}", target="llm.")
    speech = perception_table(config.perception)
    table += speech.prefixed(source="perception.", target="perception.")
    table += codec_table(config.codec).prefixed(source=CODEC, target="codec.")
    if config.speech_decoder is not None:
        decoder = speech_decoder_table(
            config.speech_decoder, is_projected=config.speech_decoder.d_model != config.llm.width
        )
        table += decoder.prefixed(source=SPEECH_DECODER, target="speech_decoder.")
    return table


def end_rules(llm: DecoderConfig, wrapped: str) -> tuple[Rule, ...]:
    """The LLM's embedding and head, which NeMo takes out of it; `wrapped` is PEFT's prefix."""
    if llm.tied:
        embedding = Rule(
            source="embed_tokens.weight",
            target="llm.embedding.weight",
            aliases=("lm_head.weight",),
            parameter="lm_head.weight",
            also=(f"llm.{wrapped}embed_tokens.weight",),
            where_copies_differ=TIED_COPIES_DIFFER,
        )
        ends: tuple[Rule, ...] = (embedding,)
    else:
        ends = (
            Rule(source="embed_tokens.weight", target="llm.embedding.weight"),
            Rule(source="lm_head.weight", target="llm.head.weight"),
        )
    return (*ends, *head_bias_rules(llm, "", "llm."))


def codec_file_table(config: DuplexConfig) -> Table:
    """A NeMo audio codec -> the network's `codec.`."""
    return codec_table(config.codec).prefixed(target="codec.")
