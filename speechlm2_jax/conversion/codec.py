"""NeMo's names of an AudioCodecModel: encoder, decoder and quantizer."""

from speechlm2_jax.codec.activations import SHARES
from speechlm2_jax.codec.config import (
    CodecConfig,
    GroupFiniteScalarQuantizerConfig,
    HiFiGANConfig,
    QuantizerConfig,
)
from speechlm2_jax.conversion.mapping import LAYER, Ignored, Rule, Table
from speechlm2_jax.conversion.transforms import Squeeze

GAIN = ("parametrizations.weight.original0", "weight_g")
DIRECTION = ("parametrizations.weight.original1", "weight_v")
"""torch's names since 2.0, which are written, and those before."""
ALPHAS = {"snake": "activation.alpha", "half_snake": "activation.snake_act.alpha"}
IGNORED = (
    Ignored(r"discriminator\..*", "trains the codec; a trained one needs none"),
    Ignored(r"(?:\w+_)?loss_fn\..*", "filterbanks and windows of the losses that train the codec"),
    Ignored(
        r"(?:slm_encoder|slm_predictor|speaker_encoder|speaker_encoder_resampler)\..*",
        "what the codec was taught to agree with in training",
    ),
)
_LOSSES = "nemo.collections.tts.losses.audio_codec_loss"
ASKED_BY_NEMO = {
    "target": "nemo.collections.tts.models.audio_codec.AudioCodecModel",
    "discriminator": None,
    "generator_loss": {"_target_": f"{_LOSSES}.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": f"{_LOSSES}.DiscriminatorSquaredLoss"},
    "loss_resolutions": [[512, 128, 512]],
    "mel_loss_dims": [40],
    "commit_loss_scale": 0.0,
}
"""What NeMo's AudioCodecModel wants in a config beside the architecture: how it would be trained.
A codec made here gets these to be opened there; nothing here reads them."""


def codec_table(config: CodecConfig) -> Table:
    """The whole codec, below `audio_codec.` in the checkpoint of a speech model."""
    encoder, decoder = config.audio_encoder, config.audio_decoder
    rules = _generator(encoder, len(encoder.down_sample_rates), "down_sample_conv_layers", "down")
    table = Table(tuple(rules)).prefixed(source="audio_encoder.", target="encoder.")
    rules = _generator(decoder, len(decoder.up_sample_rates), "up_sample_conv_layers", "up")
    table += Table(tuple(rules)).prefixed(source="audio_decoder.", target="decoder.")
    quantizer = Table(tuple(_quantizer(config.vector_quantizer)))
    table += quantizer.prefixed(source="vector_quantizer.", target="quantizer.")
    return table + Table((), IGNORED)


def _generator(config: HiFiGANConfig, stages: int, resamplers: str, ours: str) -> list[Rule]:
    rules = [
        *_convolution("pre_conv", "input"),
        *_activation(config, "post_activation", "activation"),
        *_convolution("post_conv", "output"),
    ]
    for i in range(stages):
        rules += _activation(config, f"activations.{i}", f"stages.{i}.activation")
        rules += _convolution(f"{resamplers}.{i}", f"stages.{i}.{ours}")
        rules += _residual_layer(config, f"res_layers.{i}", f"stages.{i}.residual")
    return rules


def _residual_layer(config: HiFiGANConfig, source: str, target: str) -> list[Rule]:
    rules: list[Rule] = []
    for chain in range(len(config.resblock_kernel_sizes)):
        for block in range(len(config.resblock_dilation_sizes)):
            theirs = f"{source}.res_blocks.{chain}.res_blocks.{block}"
            ours = f"{target}.chains.{chain}.{block}"
            rules += _activation(config, f"{theirs}.input_activation", f"{ours}.first_activation")
            rules += _convolution(f"{theirs}.input_conv", f"{ours}.first")
            rules += _activation(config, f"{theirs}.skip_activation", f"{ours}.second_activation")
            rules += _convolution(f"{theirs}.skip_conv", f"{ours}.second")
    return rules


def _convolution(source: str, target: str) -> list[Rule]:
    (gain, old_gain), (direction, old_direction) = GAIN, DIRECTION
    return [
        Rule(
            source=f"{source}.conv.{gain}",
            target=f"{target}.weight.gain",
            transform=Squeeze((1, 2)),
            also=(f"{source}.conv.{old_gain}",),
        ),
        Rule(
            source=f"{source}.conv.{direction}",
            target=f"{target}.weight.direction",
            also=(f"{source}.conv.{old_direction}",),
        ),
        Rule(source=f"{source}.conv.bias", target=f"{target}.bias"),
    ]


def _activation(config: HiFiGANConfig, source: str, target: str) -> list[Rule]:
    name = config.activation.lower()
    if name not in SHARES:
        return []
    return [
        Rule(
            source=f"{source}.{ALPHAS[name]}",
            target=f"{target}.alpha",
            transform=Squeeze((0, 2)),
        )
    ]


def _quantizer(config: QuantizerConfig) -> list[Rule]:
    grouped = isinstance(config, GroupFiniteScalarQuantizerConfig)
    place, axes = (f"fsqs.{LAYER}.", (0, 2)) if grouped else ("", (2,))
    return [
        Rule(source=f"{place}{theirs}", target=ours, transform=Squeeze(axes))
        for theirs, ours in (("num_levels", "levels"), ("dim_base_index", "bases"))
    ]
