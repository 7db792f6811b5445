"""The norms of a decoder."""

from flax import nnx

from speechlm2_jax.layers.norms import LayerNorm, RMSNorm
from speechlm2_jax.llm.config import DecoderConfig


def make_norm(config: DecoderConfig, width: int, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    """Makes a norm over the last axis, of size `width`."""
    plus_one = config.norm.endswith("1p")
    if config.norm.startswith("rms"):
        return RMSNorm(width, rngs=rngs, eps=config.norm_eps, plus_one=plus_one)
    return LayerNorm(
        width, rngs=rngs, eps=config.norm_eps, bias=config.norm_bias, plus_one=plus_one
    )
