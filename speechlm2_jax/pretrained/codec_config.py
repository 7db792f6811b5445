"""The configuration of an audio codec, from NeMo's archives."""

from collections.abc import Mapping

from speechlm2_jax.codec.config import CodecConfig
from speechlm2_jax.settings import build

BLOCKS = (
    "sample_rate",
    "output_sample_rate",
    "samples_per_frame",
    "audio_encoder",
    "audio_decoder",
    "vector_quantizer",
    "semantic_codec",
    "semantic_codec_path",
)
"""Keys of a `.nemo` file's config that describe the codec; the others configure its training."""


def codec_config(cfg: Mapping[str, object], where: str = "") -> CodecConfig:
    """Reads NeMo's `model_config.yaml` of a codec. Raises SettingsError for unsupported values."""
    return build(CodecConfig, {key: cfg[key] for key in BLOCKS if key in cfg}, where)
