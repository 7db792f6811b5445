"""Subsampling in front of a Conformer: convolutions halve time and frequency, or stacks of frames.

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
        """Convolves an image whose last axis is the channels; `time_padding` if not the usual."""
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
    """What each tap of a 3x3, stride-2 kernel sees: nine images of the output's size."""
    axes = list(zip(x.shape[1:3], padding, strict=True))
    sizes = [(n + sum(zeros) - KERNEL) // STRIDE + 1 for n, zeros in axes]
    # one more phase than outputs: tap 2 reads the even phase one step ahead
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
    """One halving by a depthwise convolution, then a mix of the channels (`dw_striding`)."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.depthwise = HalvingConv(channels, channels, padding=padding, depthwise=True, rngs=rngs)
        self.pointwise = Linear(channels, channels, axes=("conv", "conv"), rngs=rngs)

    def __call__(self, x: Image, time_padding: tuple[int, int] | None = None) -> Halved:
        """Halves time and frequency."""
        return self.pointwise(self.depthwise(x, time_padding))


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
        """Halves time as often as the factor says; frames and lengths come out."""
        del extents
        if self.conv_in is None:
            return Frames(frames=self.output(features), lengths=lengths)
        x = _zero_padding(features[..., None], lengths)
        for stage in (self.conv_in, *self.stages):
            lengths = self.config.halved(lengths)
            x = _zero_padding(jax.nn.relu(stage(x)), lengths)
        return Frames(frames=self.flatten(x), lengths=lengths)

    def flatten(self, x: Image) -> Float[Array, "B T D"]:
        """Projects what the last stage gives."""
        # the checkpoint's projection numbers its inputs channel by channel
        return self.output(x.swapaxes(2, 3).reshape(*x.shape[:2], -1))


class Stacking(nnx.Module):
    """Frames [B, T, feat_in] -> [B, T / factor, d_model]: neighbours side by side, projected.

    Frames beyond a length are silence. NeMo leaves them as they are up to the end of its padded
    batch; `extents` says where that is.
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
        """Stacks; a last stack that is not full is filled up with silence and counts."""
        x = _zero_padding(features, lengths if extents is None else extents)
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.config.subsampling_factor), (0, 0)))
        return Frames(frames=self.project_stacks(x), lengths=self.config.subsampled(lengths))

    def project_stacks(self, x: Float[Array, "B T D"]) -> Float[Array, "B T2 D2"]:
        """Projects whole stacks."""
        if self.norm is not None:
            x = self.norm(x)
        batch, length, width = x.shape
        factor = self.config.subsampling_factor
        return self.output(x.reshape(batch, length // factor, factor * width))


def make_subsampling(config: FastConformerConfig, *, rngs: nnx.Rngs) -> Subsampling | Stacking:
    """Builds what a config asks for."""
    return (Stacking if config.is_stacking else Subsampling)(config, rngs=rngs)


def _zero_padding(
    x: Float[Array, "B T *rest"], lengths: Int[Array, " B"]
) -> Float[Array, "B T *rest"]:
    is_real = is_within(lengths, x.shape[1])
    return jnp.where(jnp.expand_dims(is_real, range(2, x.ndim)), x, jnp.zeros((), x.dtype))
