"""NeMo's names of AudioPerceptionModule, and of the ASR models whose encoder it takes over."""

from speechlm2_jax.conversion.fastconformer import fastconformer_table
from speechlm2_jax.conversion.mapping import Ignored, Rule, Table
from speechlm2_jax.conversion.transforms import Squeeze
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.perception import PerceptionConfig

LOG_MEL = Table(
    (
        Rule(
            source="preprocessor.featurizer.fb",
            target="log_mel.filterbank",
            transform=Squeeze((0,)),
        ),
        Rule(source="preprocessor.featurizer.window", target="log_mel.window"),
    )
)
ASR_HEADS = Ignored(
    r"(?!(?:encoder|preprocessor)\.).*",
    "what turns an ASR encoder's frames into text; a speech LLM takes the encoder only",
)


def perception_table(config: PerceptionConfig) -> Table:
    """The whole module, below `perception.`."""
    table = asr_encoder_table(config)
    if isinstance(config.modality_adapter, FastConformerConfig):
        adapter = fastconformer_table(config.modality_adapter)
        table += adapter.prefixed(source="modality_adapter.", target="adapter.")
    if config.is_projected:
        table += Table(
            (
                Rule(source="proj.weight", target="projection.weight"),
                Rule(source="proj.bias", target="projection.bias"),
            )
        )
    return table


def asr_encoder_table(config: PerceptionConfig) -> Table:
    """Front end and encoder: what an ASR model's checkpoint fills."""
    encoder = fastconformer_table(config.encoder)
    return LOG_MEL + encoder.prefixed(source="encoder.", target="encoder.")


def asr_table(config: PerceptionConfig) -> Table:
    """A NeMo ASR checkpoint (`.nemo`), of which the heads are left out."""
    return asr_encoder_table(config) + Table((), (ASR_HEADS,))
