"""Weight-normalised convolutions over time: same rate, downsampling and upsampling.

Kernels have torch's layout: [out, in, taps], or [in, out, taps] for upsampling (a transposed
convolution). A rate change by s has 2 s taps. It is computed as a convolution of 2 taps over
blocks of s positions: the same sum, and on a CPU faster than XLA's strided and dilated forms.
XLA's grouped convolution takes about a hundred times as long as the same sum of two products.
"""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float

from speechlm2_jax.codec.boundary import Boundary, PaddedSequence, Signal
from speechlm2_jax.layers.linear import zeros
from speechlm2_jax.layers.module import Initializer, buffer, param
from speechlm2_jax.sharding import platform

FULL_CHANNELS, MAX_CHANNELS = 16, 96
"""On a CPU: channels that fill a vector unit, and the most that blocks may have."""

_torch_init: Initializer = jax.nn.initializers.variance_scaling(
    1.0 / 3.0, "fan_in", "uniform", in_axis=(1, 2), out_axis=0
)


class WeightNorm(nnx.Module):
    """Weight norm (arXiv 1602.07868): gain * direction / |direction|, over all axes but 0."""

    def __init__(self, shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.direction = param(rngs, shape, ("conv",) * 3, _torch_init)
        self.gain = param(
            rngs, shape[:1], ("conv",), lambda *_: _norms(self.direction[...])[:, 0, 0]
        )

    def __call__(self) -> Float[Array, "N M P"]:
        """Computes the kernel, in fp32."""
        direction = jnp.asarray(self.direction[...], jnp.float32)
        gain = jnp.asarray(self.gain[...], jnp.float32)[:, None, None]
        return direction * (gain / _norms(direction))


class FoldedKernel(nnx.Module):
    """A precomputed kernel in the layout of its convolution."""

    def __init__(self, kernel: Array):
        self.kernel = buffer(kernel, ("conv",) * kernel.ndim)


class CodecConvolution(nnx.Module):
    """Base of the convolutions: a weight-normalised kernel and a bias."""

    def __init__(self, shape: tuple[int, int, int], channels: int, *, rngs: nnx.Rngs):
        self.weight: WeightNorm | FoldedKernel = WeightNorm(shape, rngs=rngs)
        self.bias = param(rngs, (channels,), ("conv",), zeros)

    @abstractmethod
    def arrange(self, weight: Float[Array, "N M P"]) -> Array:
        """Transposes the kernel to the layout of the convolution."""

    def kernel(self) -> Array:
        """Returns the kernel in the layout of the convolution."""
        if isinstance(self.weight, FoldedKernel):
            return self.weight.kernel[...]
        return self.arrange(self.weight())

    def fold(self) -> None:
        """Replaces gain and direction by the computed kernel."""
        self.weight = FoldedKernel(self.kernel())

    def add_bias(self, x: Signal) -> Signal:
        """Adds the bias."""
        return x + jnp.asarray(self.bias[...], jnp.float32)[None, None]


class SameRateConv(CodecConvolution):
    """Convolution of any kernel size and dilation that keeps the length."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        taps: int,
        *,
        dilation: int = 1,
        is_causal: bool,
        pad_mode: str,
        rngs: nnx.Rngs,
    ):
        super().__init__((channels_out, channels_in, taps), channels_out, rngs=rngs)
        self.dilation = dilation
        reach = (taps - 1) * dilation
        self.before, self.after = (reach, 0) if is_causal else (reach // 2, reach // 2)
        self.pad_mode = "zeros" if is_causal else pad_mode

    def arrange(self, weight: Float[Array, "N M P"]) -> Float[Array, "P M N"]:
        """[taps, in, out]."""
        return weight.transpose(2, 1, 0)

    def __call__(self, x: Signal, boundary: Boundary) -> Float[Array, "B T D"]:
        """Convolves."""
        extended = boundary.pad(x, self.before, self.after, self.pad_mode)
        return boundary.mask_padding(
            self.add_bias(_convolve(extended, self.kernel(), self.dilation))
        )


class DownsampleConv(CodecConvolution):
    """Downsamples by `rate`; the length must be a multiple of it."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        rate: int,
        *,
        is_causal: bool,
        pad_mode: str,
        rngs: nnx.Rngs,
    ):
        super().__init__((channels_out, channels_in, 2 * rate), channels_out, rngs=rngs)
        self.rate = rate
        self.before = rate if is_causal else (rate + 1) // 2
        self.pad_mode = "zeros" if is_causal else pad_mode

    def arrange(self, weight: Float[Array, "N M P"]) -> Float[Array, "2 J N"]:
        """[block, position in the block * input channel, out]."""
        return weight.transpose(2, 1, 0).reshape(2, -1, weight.shape[0])

    def __call__(self, x: Signal, boundary: Boundary) -> tuple[Float[Array, "B T2 D"], Boundary]:
        """Convolves; also returns the boundary at the new rate."""
        x = boundary.pad(x, self.before, self.rate - self.before, self.pad_mode).materialize()
        blocks = x.reshape(x.shape[0], -1, self.rate * x.shape[2])
        boundary = boundary.downsampled(self.rate)
        return boundary.mask_padding(
            self.add_bias(_convolve(PaddedSequence(blocks), self.kernel()))
        ), boundary


class UpsampleConv(CodecConvolution):
    """Upsamples by `rate` (a transposed convolution), with zeros beyond the ends."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        rate: int,
        *,
        is_causal: bool,
        is_grouped: bool,
        rngs: nnx.Rngs,
    ):
        outputs = 1 if is_grouped else channels_out
        super().__init__((channels_in, outputs, 2 * rate), channels_out, rngs=rngs)
        self.rate, self.channels, self.is_grouped = rate, channels_out, is_grouped
        self.cut = 0 if is_causal else (rate + 1) // 2
        """Output positions that are dropped on the left."""

    def arrange(self, weight: Float[Array, "N M P"]) -> Array:
        """[previous or current input, in, position in the block * output channel].

        Grouped: [previous or current input, input of the group, position in the block, out].
        """
        count, outputs, taps = weight.shape
        halves = weight.reshape(count, outputs, 2, taps // 2)[:, :, ::-1]
        if self.is_grouped:
            grouped = halves.reshape(self.channels, -1, 2, taps // 2)
            return grouped.transpose(2, 1, 3, 0)
        return halves.transpose(2, 0, 3, 1).reshape(2, count, -1)

    def __call__(self, x: Signal, boundary: Boundary) -> tuple[Float[Array, "B T2 D"], Boundary]:
        """Convolves; also returns the boundary at the new rate."""
        batch, steps, _ = x.shape
        extended = boundary.pad(x, 1, 1 if self.cut else 0, "zeros")
        if self.is_grouped:
            y = self._grouped(extended.materialize())
        else:
            y = _convolve(extended, self.kernel())
        y = y.reshape(batch, -1, self.channels)[:, self.cut : self.cut + steps * self.rate]
        boundary = boundary.upsampled(self.rate)
        return boundary.mask_padding(self.add_bias(y)), boundary

    def _grouped(self, x: Signal) -> Float[Array, "B T2 R D"]:
        """Sums over a group's inputs, and over the current and the previous input position."""
        kernel = self.kernel()
        inputs = x.reshape(*x.shape[:2], self.channels, -1)[:, :, None]
        steps = x.shape[1] - 1
        products = [
            inputs[:, half : half + steps, ..., i] * kernel[half, i][None, None]
            for half in range(2)
            for i in range(inputs.shape[-1])
        ]
        return sum(products[1:], products[0])


def _convolve(
    x: PaddedSequence, kernel: Float[Array, "P C D"], dilation: int = 1
) -> Float[Array, "B T2 D"]:
    block = _block_size(*kernel.shape[1:]) if platform() == "cpu" else 1
    if block > 1:
        return _convolve_in_blocks(x, kernel, dilation, block)
    return jax.lax.conv_general_dilated(
        x.values,
        kernel,
        window_strides=(1,),
        padding=(x.zeros,),
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=Precision.HIGHEST,
    )


def _block_size(channels_in: int, channels_out: int) -> int:
    """Returns how many positions to convolve together: a power of two; 1 for many channels."""
    narrow, wide = sorted((channels_in, channels_out))
    room = min(FULL_CHANNELS // narrow, MAX_CHANNELS // wide)
    return 1 << max(room.bit_length() - 1, 0)


def _convolve_in_blocks(
    x: PaddedSequence, kernel: Float[Array, "P C D"], dilation: int, block: int
) -> Float[Array, "B T2 D"]:
    """Computes the same convolution over blocks of positions, folded into the channel axis.

    Positions `dilation` apart form sequences of their own. A CPU multiplies 16 channels as fast as
    2, so this is 2 to 10 times as fast as XLA's convolution of few channels (docs/performance.md).
    """
    taps, channels_in, channels_out = kernel.shape
    batch, given, _ = x.values.shape
    steps = given + sum(x.zeros) - (taps - 1) * dilation
    is_around = any(x.zeros)
    back = x.zeros[0] // dilation  # taps before the current position; 0 without zeros
    before, after = (
        -(-back // block),
        (block + taps - 2 - back) // block,
    )  # neighbouring blocks in the window
    window = (before + 1 + after) * block
    first = before * block - back
    shifted = [
        jnp.pad(kernel, ((first + n, window - taps - first - n), (0, 0), (0, 0)))
        for n in range(block)
    ]
    joint = jnp.stack(shifted, axis=2)  # [window, in, position in the block, out]
    joint = joint.reshape(before + 1 + after, block * channels_in, block * channels_out)
    size = block * dilation
    blocks = -(-steps // size)
    read = blocks if is_around else blocks + after
    rows = jnp.pad(x.values, ((0, 0), (0, max(0, read * size - given)), (0, 0)))[:, : read * size]
    rows = rows.reshape(batch, -1, block, dilation, channels_in).transpose(0, 3, 1, 2, 4)
    rows = rows.reshape(batch * dilation, read, block * channels_in)
    y = _convolve(PaddedSequence(rows, (before, after) if is_around else (0, 0)), joint)
    y = y.reshape(batch, dilation, blocks, block, channels_out).transpose(0, 2, 3, 1, 4)
    return y.reshape(batch, -1, channels_out)[:, :steps]


def _norms(direction: Float[Array, "N M P"]) -> Float[Array, "N 1 1"]:
    return jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True))
