"""Encoder of a codec: waveforms -> frames, the mirror image of a HiFi-GAN generator."""

from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.codec.activations import Activation
from speechlm2_jax.codec.boundary import Boundary, Signal
from speechlm2_jax.codec.config import EncoderConfig
from speechlm2_jax.codec.convolutions import DownsampleConv
from speechlm2_jax.codec.residual import ResidualLayer, make_conv


class EncoderStage(nnx.Module):
    """Residual layer, activation, downsampling convolution to twice the channels."""

    def __init__(self, config: EncoderConfig, channels: int, rate: int, *, rngs: nnx.Rngs):
        self.residual = ResidualLayer(config, channels, rngs=rngs)
        self.activation = Activation(config.activation, channels, rngs=rngs)
        self.down = DownsampleConv(
            channels,
            2 * channels,
            rate,
            is_causal=config.is_causal,
            pad_mode=config.pad_mode,
            rngs=rngs,
        )

    def __call__(self, x: Signal, boundary: Boundary) -> tuple[Float[Array, "B T2 D"], Boundary]:
        """Downsamples; also returns the boundary at the new rate."""
        return self.down(self.activation(self.residual(x, boundary)), boundary)


class HiFiGANEncoder(nnx.Module):
    """Audio [B, S, 1] -> frames [B, S / samples_per_frame, encoded_dim]."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        channels = config.base_channels
        self.input = make_conv(config, 1, channels, config.in_kernel_size, rngs=rngs)
        stages = []
        for rate in config.down_sample_rates:
            stages.append(EncoderStage(config, channels, rate, rngs=rngs))
            channels *= 2
        self.stages = nnx.List(stages)
        self.activation = Activation(config.activation, channels, rngs=rngs)
        self.output = make_conv(
            config, channels, config.encoded_dim, config.out_kernel_size, rngs=rngs
        )

    def __call__(
        self, audio: Signal, boundary: Boundary
    ) -> tuple[Float[Array, "B T2 D"], Boundary]:
        """Encodes a whole number of frames; also returns their boundary."""
        x = self.input(audio, boundary)
        for stage in self.stages:
            x, boundary = stage(x, boundary)
        return self.output(self.activation(x), boundary), boundary
