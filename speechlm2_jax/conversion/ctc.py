"""NeMo's parameter names of CTC models: EncDecCTCModel(BPE), and the CTC half of hybrid models."""

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
    others = tuple({CTC_HEAD, HYBRID_HEAD} - {head})
    return asr_encoder_table(config) + Table(head_rules(head, also=others), (TRANSDUCER,))


def head_rules(head: str, *, also: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """The head alone, written to `head` and read from there or from the places `also`."""

    def names(kind: str) -> list[str]:
        return [f"{place}.decoder_layers.0.{kind}" for place in (head, *also)]

    weight, *weight_also = names("weight")
    bias, *bias_also = names("bias")
    return (
        Rule(
            source=weight,
            target="head.weight",
            transform=Squeeze((2,)),
            also=tuple(weight_also),
        ),
        Rule(source=bias, target="head.bias", also=tuple(bias_also)),
    )
