"""Convolutional subsampling in front of a Conformer: each stage halves time and frequency.

Convolutions are written as sums over their nine taps on contiguous phases of the image. XLA's own
strided and grouped convolutions are several times slower on CPU, and no faster than a fused
multiply-add elsewhere, because the depthwise stages are bound by memory.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.linear import Linear, zeros
from speechlm2_jax.layers.module import param
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frames import Frames, is_within
from speechlm2_jax.perception.initializers import uniform

Image = Float[Array, "B T F C"]
Halved = Float[Array, "B T2 F2 C2"]
KERNEL = 3
STRIDE = 2


class HalvingConv(nnx.Module):
    """3x3 convolution, stride 2 in time and frequency, full or depthwise; [out, in, 3, 3]."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        padding: tuple[int, int],
        depthwise: bool,
        rngs: nnx.Rngs,
    ):
        self.padding = padding
        self.depthwise = depthwise
        fan = 1 if depthwise else channels_in
        self.weight = param(
            rngs,
            (channels_out, fan, KERNEL, KERNEL),
            ("conv",) * 4,
            uniform(fan * KERNEL * KERNEL),
        )
        self.bias = param(rngs, (channels_out,), ("conv",), zeros)

    def __call__(self, x: Image) -> Halved:
        """Convolves an image whose last axis is the channels."""
        weight = self.weight[...].astype(x.dtype)
        taps = _taps(x, self.padding)
        if self.depthwise:
            y = sum(tap * weight[None, None, None, :, 0, i, j] for (i, j), tap in taps.items())
        elif x.shape[-1] == 1:
            columns = jnp.concatenate(list(taps.values()), axis=-1)
            y = columns @ weight.reshape(weight.shape[0], -1).T
        else:
            y = sum(tap @ weight[:, :, i, j].T for (i, j), tap in taps.items())
        return y + self.bias[...].astype(x.dtype)[None, None, None]


def _taps(x: Image, padding: tuple[int, int]) -> dict[tuple[int, int], Halved]:
    """What each tap of a 3x3, stride-2 kernel sees: nine images of the output's size."""
    sizes = [(n + sum(padding) - KERNEL) // STRIDE + 1 for n in x.shape[1:3]]
    # one more phase than outputs: tap 2 reads the even phase one step ahead
    after = [
        STRIDE * (out + 1) - n - padding[0] for out, n in zip(sizes, x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *((padding[0], extra) for extra in after), (0, 0)))
    phases = x.reshape(x.shape[0], sizes[0] + 1, STRIDE, sizes[1] + 1, STRIDE, x.shape[-1])

    def tap(i: int, j: int) -> Halved:
        (a, p), (b, q) = divmod(i, STRIDE), divmod(j, STRIDE)
        return phases[:, a : a + sizes[0], p, b : b + sizes[1], q]

    return {(i, j): tap(i, j) for i in range(KERNEL) for j in range(KERNEL)}


class FullStage(nnx.Module):
    """One halving by a full convolution (`striding`)."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.conv = HalvingConv(channels, channels, padding=padding, depthwise=False, rngs=rngs)

    def __call__(self, x: Image) -> Halved:
        """Halves time and frequency."""
        return self.conv(x)


class SeparableStage(nnx.Module):
    """One halving by a depthwise convolution, then a mix of the channels (`dw_striding`)."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.depthwise = HalvingConv(channels, channels, padding=padding, depthwise=True, rngs=rngs)
        self.pointwise = Linear(channels, channels, axes=("conv", "conv"), rngs=rngs)

    def __call__(self, x: Image) -> Halved:
        """Halves time and frequency."""
        return self.pointwise(self.depthwise(x))


STAGES = {"striding": FullStage, "dw_striding": SeparableStage}


class Subsampling(nnx.Module):
    """Frames [B, T, feat_in] -> [B, T / factor, d_model]; with factor 1 a plain projection.

    Frames beyond a length are silenced before every convolution, so that padding reaches no real
    frame (and they come out as the bias of the last projection).
    """

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, padding = config.conv_channels, config.stage_padding
        self.conv_in = (
            HalvingConv(1, channels, padding=padding, depthwise=False, rngs=rngs)
            if config.stages
            else None
        )
        stage = STAGES[config.subsampling]
        self.stages = nnx.List(
            [stage(channels, padding, rngs=rngs) for _ in range(config.stages - 1)]
        )
        bins = config.subsampled(config.feat_in)
        width = channels * bins if config.stages else config.feat_in
        self.output = Linear(width, config.d_model, axes=("embed", "conv"), rngs=rngs)

    def __call__(self, features: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Frames:
        """Halves time as often as the factor says; frames and lengths come out."""
        if self.conv_in is None:
            return Frames(frames=self.output(features), lengths=lengths)
        x = _silence(features[..., None], lengths)
        for stage in (self.conv_in, *self.stages):
            lengths = (lengths + sum(self.config.stage_padding) - KERNEL) // STRIDE + 1
            x = _silence(jax.nn.relu(stage(x)), lengths)
        # the checkpoint's projection numbers its inputs channel by channel
        x = x.swapaxes(2, 3).reshape(*x.shape[:2], -1)
        return Frames(frames=self.output(x), lengths=lengths)


def _silence(x: Image, lengths: Int[Array, " B"]) -> Image:
    is_real = is_within(lengths, x.shape[1])[:, :, None, None]
    return jnp.where(is_real, x, jnp.zeros((), x.dtype))
