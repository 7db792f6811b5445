"""NeMo's names of AudioPerceptionModule, and of the ASR models whose encoder it takes over."""

from speechlm2_jax.conversion.fastconformer import fastconformer_table, with_bias
from speechlm2_jax.conversion.mapping import LAYER, Ignored, Rule, Table
from speechlm2_jax.conversion.transforms import Squeeze
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.modality_adapter import AdapterConfig, MultiLayerConfig
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.perception.qformer import QformerConfig

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
_ATTENTION = {
    "query": "self.query",
    "key": "self.key",
    "value": "self.value",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
QFORMER_LAYERS = {
    **{f"attention.{ours}": f"attention.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{
        f"cross_attention.{ours}": f"crossattention.{theirs}" for ours, theirs in _ATTENTION.items()
    },
    "hidden": "intermediate.dense",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
ASR_HEADS = Ignored(
    r"(?!(?:encoder|preprocessor)\.).*",
    "what turns an ASR encoder's frames into text; a speech LLM takes the encoder only",
)


def perception_table(config: PerceptionConfig) -> Table:
    """The whole module, below `perception.`."""
    # NeMo wraps an encoder of which its adapter reads several layers
    wrapper = "encoder_multilayer." if config.layers_read else ""
    encoder = fastconformer_table(config.encoder)
    table = LOG_MEL + encoder.prefixed(source=f"{wrapper}encoder.", target="encoder.")
    return table + adapter_table(config)


def adapter_table(config: PerceptionConfig) -> Table:
    """The modality adapter and the projection, below `perception.`."""
    adapter = _adapter_table(config.modality_adapter)
    table = adapter.prefixed(source="modality_adapter.", target="adapter.")
    if config.is_projected:
        table += Table(tuple(with_bias("proj", "projection")))
    return table


def _adapter_table(config: AdapterConfig) -> Table:
    if isinstance(config, FastConformerConfig):
        return fastconformer_table(config)
    if isinstance(config, MultiLayerConfig):
        return Table(tuple(with_bias("proj", "projection")))
    if isinstance(config, QformerConfig):
        return _qformer_table()
    return Table(())


def _qformer_table() -> Table:
    """The connector's own names, and those of transformers' BertEncoder inside it."""
    rules = [
        Rule(source=f"layer_prompts.{LAYER}", target="prompts", transform=Squeeze((0,))),
        Rule(source="layer_weights", target="layer_weights"),
        *with_bias("proj.0", "norm"),
        *with_bias("proj.1", "projection"),
    ]
    for ours, theirs in QFORMER_LAYERS.items():
        rules += with_bias(f"qformer.layer.{LAYER}.{theirs}", f"layers.{ours}")
    return Table(tuple(rules))


def asr_encoder_table(config: PerceptionConfig) -> Table:
    """Front end and encoder: what an ASR model's checkpoint fills."""
    encoder = fastconformer_table(config.encoder)
    return LOG_MEL + encoder.prefixed(source="encoder.", target="encoder.")


def asr_table(config: PerceptionConfig) -> Table:
    """A NeMo ASR checkpoint (`.nemo`), of which the heads are left out."""
    return asr_encoder_table(config) + Table((), (ASR_HEADS,))
