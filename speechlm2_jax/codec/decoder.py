"""Decoder of a codec: frames -> waveforms, the generator of HiFi-GAN (Kong et al. 2020)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.codec.activations import Activation
from speechlm2_jax.codec.boundary import Boundary, Signal
from speechlm2_jax.codec.config import DecoderConfig
from speechlm2_jax.codec.convolutions import UpsampleConv
from speechlm2_jax.codec.residual import ResidualLayer, make_conv

BOUNDED = {"tanh": jnp.tanh, "clamp": lambda x: jnp.clip(x, -1.0, 1.0)}


class DecoderStage(nnx.Module):
    """Activation, upsampling convolution to half of the channels, residual layer."""

    def __init__(self, config: DecoderConfig, channels: int, rate: int, *, rngs: nnx.Rngs):
        self.activation = Activation(config.activation, channels, rngs=rngs)
        self.up = UpsampleConv(
            channels,
            channels // 2,
            rate,
            is_causal=config.is_causal,
            is_grouped=config.n_groups_equal_to_out_channels,
            rngs=rngs,
        )
        self.residual = ResidualLayer(config, channels // 2, rngs=rngs)

    def __call__(self, x: Signal, boundary: Boundary) -> tuple[Float[Array, "B T2 D"], Boundary]:
        """Upsamples; also returns the boundary at the new rate."""
        x, boundary = self.up(self.activation(x), boundary)
        return self.residual(x, boundary), boundary


class HiFiGANDecoder(nnx.Module):
    """Frames [B, T, input_dim] -> audio [B, T * samples_per_frame, 1] within [-1, 1]."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.base_channels
        self.input = make_conv(config, config.input_dim, channels, config.in_kernel_size, rngs=rngs)
        stages = []
        for rate in config.up_sample_rates:
            stages.append(DecoderStage(config, channels, rate, rngs=rngs))
            channels //= 2
        self.stages = nnx.List(stages)
        self.activation = Activation(config.activation, channels, rngs=rngs)
        self.output = make_conv(config, channels, 1, config.out_kernel_size, rngs=rngs)

    def __call__(
        self, frames: Signal, boundary: Boundary
    ) -> tuple[Float[Array, "B S 1"], Boundary]:
        """Decodes frames; also returns the boundary of the samples."""
        x = self.input(frames, boundary)
        for stage in self.stages:
            x, boundary = stage(x, boundary)
        x = self.output(self.activation(x), boundary)
        return BOUNDED[self.config.output_activation](x), boundary
