"""NeMo's names of CTC recognisers: EncDecCTCModel(BPE), and the CTC half of hybrid models."""

from speechlm2_jax.conversion.mapping import Ignored, Rule, Table
from speechlm2_jax.conversion.perception import asr_encoder_table
from speechlm2_jax.conversion.transforms import Squeeze
from speechlm2_jax.perception.perception import PerceptionConfig

CTC_HEAD, HYBRID_HEAD = "decoder", "ctc_decoder"
"""Where a CTC model keeps its head, and where a hybrid one, whose `decoder` is the transducer's."""
TRANSDUCER = Ignored(
    r"(?:decoder\.prediction|joint)\..*",
    "the transducer of a hybrid model; only the CTC head over the same encoder is taken",
)


def ctc_table(config: PerceptionConfig, *, head: str = CTC_HEAD) -> Table:
    """Front end, encoder and head; the head is a convolution over one frame in NeMo.

    It is read from either place and written to `head`.
    """
    places = [head, *({CTC_HEAD, HYBRID_HEAD} - {head})]
    weight, *weight_also = [f"{place}.decoder_layers.0.weight" for place in places]
    bias, *bias_also = [f"{place}.decoder_layers.0.bias" for place in places]
    rules = (
        Rule(
            source=weight,
            target="head.weight",
            transform=Squeeze((2,)),
            also=tuple(weight_also),
        ),
        Rule(source=bias, target="head.bias", also=tuple(bias_also)),
    )
    return asr_encoder_table(config) + Table(rules, (TRANSDUCER,))
