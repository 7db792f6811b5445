"""Residual layers of HiFi-GAN (Kong et al. 2020): parallel chains of dilated convolutions."""

from flax import nnx

from speechlm2_jax.codec.activations import Activation
from speechlm2_jax.codec.boundary import Boundary, Steps
from speechlm2_jax.codec.config import HiFiGANConfig
from speechlm2_jax.codec.convolutions import SameRate


def same_rate(
    config: HiFiGANConfig,
    channels_in: int,
    channels_out: int,
    taps: int,
    *,
    dilation: int = 1,
    rngs: nnx.Rngs,
) -> SameRate:
    """Makes a convolution that sees what the config lets it see."""
    return SameRate(
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
        self.first = same_rate(config, channels, channels, taps, dilation=dilation, rngs=rngs)
        self.second_activation = Activation(config.activation, channels, rngs=rngs)
        self.second = same_rate(config, channels, channels, taps, rngs=rngs)

    def __call__(self, x: Steps, edges: Boundary) -> Steps:
        """Adds what the two convolutions make of x."""
        y = self.first(self.first_activation(x), edges)
        return x + self.second(self.second_activation(y), edges)


class ResidualLayer(nnx.Module):
    """The mean over kernel sizes of chains of residual blocks, one per dilation."""

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

    def __call__(self, x: Steps, edges: Boundary) -> Steps:
        """Runs every chain on x."""
        outputs = []
        for chain in self.chains:
            y = x
            for block in chain:
                y = block(y, edges)
            outputs.append(y)
        return sum(outputs[1:], outputs[0]) / len(outputs)
