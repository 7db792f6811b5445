"""Subsampling before a Conformer: by convolutions of stride 2, or by stacking frames.

A convolution is written as a sum over its nine taps, each a contiguous slice of one phase of the
image. XLA's own strided and grouped convolutions are several times slower on CPU. On accelerators
they are no faster, because the depthwise stages are bound by memory bandwidth.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.linear import Linear, zeros
from speechlm2_jax.layers.module import param
from speechlm2_jax.layers.norms import LayerNorm
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

    def __call__(self, x: Image, time_padding: tuple[int, int] | None = None) -> Halved:
        """Convolves [B, T, F, C]; `time_padding` replaces the default padding of time."""
        weight = self.weight[...].astype(x.dtype)
        time = self.padding if time_padding is None else time_padding
        taps = _taps(x, (time, self.padding))
        if self.depthwise:
            y = sum(tap * weight[None, None, None, :, 0, i, j] for (i, j), tap in taps.items())
        elif x.shape[-1] == 1:
            columns = jnp.concatenate(list(taps.values()), axis=-1)
            y = columns @ weight.reshape(weight.shape[0], -1).T
        else:
            y = sum(tap @ weight[:, :, i, j].T for (i, j), tap in taps.items())
        return y + self.bias[...].astype(x.dtype)[None, None, None]


def _taps(
    x: Image, padding: tuple[tuple[int, int], tuple[int, int]]
) -> dict[tuple[int, int], Halved]:
    """Returns the input of each tap (i, j) of the kernel: nine images of the output's size."""
    axes = list(zip(x.shape[1:3], padding, strict=True))
    sizes = [(n + sum(zeros) - KERNEL) // STRIDE + 1 for n, zeros in axes]
    # one block more than outputs: tap 2 reads phase 0 of the next block
    around = [
        (zeros[0], STRIDE * (out + 1) - n - zeros[0])
        for out, (n, zeros) in zip(sizes, axes, strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    phases = x.reshape(x.shape[0], sizes[0] + 1, STRIDE, sizes[1] + 1, STRIDE, x.shape[-1])

    def tap(i: int, j: int) -> Halved:
        (a, p), (b, q) = divmod(i, STRIDE), divmod(j, STRIDE)
        return phases[:, a : a + sizes[0], p, b : b + sizes[1], q]

    return {(i, j): tap(i, j) for i in range(KERNEL) for j in range(KERNEL)}


class FullStage(nnx.Module):
    """One halving by a full convolution (`striding`)."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.conv = HalvingConv(channels, channels, padding=padding, depthwise=False, rngs=rngs)

    def __call__(self, x: Image, time_padding: tuple[int, int] | None = None) -> Halved:
        """Halves time and frequency."""
        return self.conv(x, time_padding)


class SeparableStage(nnx.Module):
    """One halving by a depthwise and a pointwise convolution (`dw_striding`)."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.depthwise = HalvingConv(channels, channels, padding=padding, depthwise=True, rngs=rngs)
        self.pointwise = Linear(channels, channels, axes=("conv", "conv"), rngs=rngs)

    def __call__(self, x: Image, time_padding: tuple[int, int] | None = None) -> Halved:
        """Halves time and frequency."""
        return self.pointwise(self.depthwise(x, time_padding))


STAGES = {"striding": FullStage, "dw_striding": SeparableStage}


class Subsampling(nnx.Module):
    """Frames [B, T, feat_in] -> [B, T / factor, d_model]; with factor 1 a plain projection.

    Frames beyond a length are zeroed before every convolution, so that padding reaches no real
    frame. (Their own output is the bias of the last projection.)
    """

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, padding = config.conv_channels, config.stage_padding
        self.conv_in = (
            HalvingConv(1, channels, padding=padding, depthwise=False, rngs=rngs)
            if config.stages
            else None
        )
        self.stages = nnx.List(
            [
                STAGES[str(config.subsampling)](channels, padding, rngs=rngs)
                for _ in range(config.stages - 1)
            ]
        )
        bins = config.subsampled(config.feat_in)
        width = channels * bins if config.stages else config.feat_in
        self.output = Linear(width, config.d_model, axes=("embed", "conv"), rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        extents: Int[Array, " B"] | None = None,
    ) -> Frames:
        """Subsamples time by the factor; returns frames and their lengths."""
        del extents
        if self.conv_in is None:
            return Frames(frames=self.output(features), lengths=lengths)
        x = _zero_padding(features[..., None], lengths)
        for stage in (self.conv_in, *self.stages):
            lengths = self.config.halved(lengths)
            x = _zero_padding(jax.nn.relu(stage(x)), lengths)
        return Frames(frames=self.flatten(x), lengths=lengths)

    def flatten(self, x: Image) -> Float[Array, "B T D"]:
        """Flattens frequency and channels of the last stage, and projects."""
        # checkpoints order the flattened axis by channel, then frequency
        return self.output(x.swapaxes(2, 3).reshape(*x.shape[:2], -1))


class Stacking(nnx.Module):
    """Frames [B, T, feat_in] -> [B, T / factor, d_model]: neighbours concatenated, projected.

    Frames beyond a length are zeroed. NeMo keeps them up to the end of its padded batch; `extents`,
    if given, is that end.
    """

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        has_norm = config.subsampling == "stacking_norm"
        self.norm = LayerNorm(config.feat_in, rngs=rngs) if has_norm else None
        width = config.feat_in * config.subsampling_factor
        self.output = Linear(width, config.d_model, axes=("embed", "conv"), rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        extents: Int[Array, " B"] | None = None,
    ) -> Frames:
        """Stacks frames; an incomplete last stack is padded with zeros and counted."""
        x = _zero_padding(features, lengths if extents is None else extents)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.config.subsampling_factor), (0, 0)))
        return Frames(frames=self.project_stacks(x), lengths=self.config.subsampled(lengths))

    def project_stacks(self, x: Float[Array, "B T D"]) -> Float[Array, "B T2 D2"]:
        """Normalises, stacks and projects a whole number of stacks."""
        if self.norm is not None:
            x = self.norm(x)
        batch, length, width = x.shape
        factor = self.config.subsampling_factor
        return self.output(x.reshape(batch, length // factor, factor * width))


def make_subsampling(config: FastConformerConfig, *, rngs: nnx.Rngs) -> Subsampling | Stacking:
    """Builds the subsampling that a config describes."""
    return (Stacking if config.is_stacking else Subsampling)(config, rngs=rngs)


def _zero_padding(
    x: Float[Array, "B T *rest"], lengths: Int[Array, " B"]
) -> Float[Array, "B T *rest"]:
    is_real = is_within(lengths, x.shape[1])
    return jnp.where(jnp.expand_dims(is_real, range(2, x.ndim)), x, jnp.zeros((), x.dtype))
