"""Residual layers of HiFi-GAN (Kong et al. 2020): parallel chains of dilated convolutions."""

from flax import nnx

from speechlm2_jax.codec.activations import Activation
from speechlm2_jax.codec.boundary import Boundary, Signal
from speechlm2_jax.codec.config import HiFiGANConfig
from speechlm2_jax.codec.convolutions import SameRateConv


def make_conv(
    config: HiFiGANConfig,
    channels_in: int,
    channels_out: int,
    taps: int,
    *,
    dilation: int = 1,
    rngs: nnx.Rngs,
) -> SameRateConv:
    """Makes a convolution with the causality and the padding of the config."""
    return SameRateConv(
        channels_in,
        channels_out,
        taps,
        dilation=dilation,
        is_causal=config.is_causal,
        pad_mode=config.pad_mode,
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """x + conv(act(conv(act(x)))); the first convolution is dilated."""

    def __init__(
        self, config: HiFiGANConfig, channels: int, taps: int, dilation: int, *, rngs: nnx.Rngs
    ):
        self.first_activation = Activation(config.activation, channels, rngs=rngs)
        self.first = make_conv(config, channels, channels, taps, dilation=dilation, rngs=rngs)
        self.second_activation = Activation(config.activation, channels, rngs=rngs)
        self.second = make_conv(config, channels, channels, taps, rngs=rngs)

    def __call__(self, x: Signal, boundary: Boundary) -> Signal:
        """Applies the two convolutions and the residual."""
        y = self.first(self.first_activation(x), boundary)
        return x + self.second(self.second_activation(y), boundary)


class ResidualLayer(nnx.Module):
    """Mean over kernel sizes of chains of residual blocks; a chain has one block per dilation."""

    def __init__(self, config: HiFiGANConfig, channels: int, *, rngs: nnx.Rngs):
        self.chains = nnx.List(
            [
                nnx.List(
                    [
                        ResidualBlock(config, channels, taps, dilation, rngs=rngs)
                        for dilation in config.resblock_dilation_sizes
                    ]
                )
                for taps in config.resblock_kernel_sizes
            ]
        )

    def __call__(self, x: Signal, boundary: Boundary) -> Signal:
        """Averages the outputs of all chains."""
        outputs = []
        for chain in self.chains:
            y = x
            for block in chain:
                y = block(y, boundary)
            outputs.append(y)
        return sum(outputs[1:], outputs[0]) / len(outputs)
