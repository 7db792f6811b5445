"""NeMo's names of transducers: EncDecRNNTBPEModel (RNN-T, TDT), EncDecHybridRNNTCTCBPEModel."""

from dataclasses import replace

from speechlm2_jax.asr.transducer import TransducerConfig
from speechlm2_jax.conversion.ctc import HYBRID_HEAD, head_rules
from speechlm2_jax.conversion.mapping import Rule, Table
from speechlm2_jax.conversion.perception import adapter_table, asr_encoder_table
from speechlm2_jax.perception.perception import PerceptionConfig

LSTM_PARTS = {"input": "ih", "recurrent": "hh"}


ASR = "asr."
"""Where NeMo's SALMWithAsrDecoder keeps the ASR model, below `perception.`."""


def transcribing_perception_table(config: PerceptionConfig, asr: TransducerConfig) -> Table:
    """The perception of a SALMWithAsrDecoder: a whole transducer, adapter and projection.

    NeMo gives the encoder a second name where the adapter reads several of its layers.
    """
    table = transducer_table(asr).prefixed(source=ASR)
    if config.layers_read:
        wrapped = tuple(_with_wrapped_name(rule) for rule in table.rules)
        table = replace(table, rules=wrapped)
    return table + adapter_table(config)


def _with_wrapped_name(rule: Rule) -> Rule:
    encoder = ASR + "encoder."
    if not rule.source.startswith(encoder):
        return rule
    return replace(rule, aliases=(rule.source.replace(encoder, "encoder_multilayer.encoder."),))


def transducer_table(config: TransducerConfig) -> Table:
    """Front end, encoder, prediction network, joint, and the CTC head of a hybrid model."""
    # with dropout its layer comes between the activation and the last projection
    last = 2 if config.joint.jointnet.dropout else 1
    linears = {
        "joint.frames": "joint.enc",
        "joint.labels": "joint.pred",
        "joint.output": f"joint.joint_net.{last}",
    }
    rules = [
        Rule(source="decoder.prediction.embed.weight", target="prediction.embedding.weight"),
        *(
            Rule(source=f"{theirs}.{kind}", target=f"{ours}.{kind}")
            for ours, theirs in linears.items()
            for kind in ("weight", "bias")
        ),
        *(
            Rule(
                source=f"decoder.prediction.dec_rnn.lstm.{kind}_{theirs}_l{layer}",
                target=f"prediction.lstm.layers.{layer}.{ours}.{kind}",
            )
            for layer in range(config.decoder.prednet.pred_rnn_layers)
            for ours, theirs in LSTM_PARTS.items()
            for kind in ("weight", "bias")
        ),
    ]
    if config.has_ctc_head:
        rules += head_rules(HYBRID_HEAD)
    return asr_encoder_table(config.perception) + Table(tuple(rules))
