"""One Conformer layer (Gulati et al. 2020): attention and convolution between two feed-forwards."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from speechlm2_jax.layers.dropout import dropout, fold_rngs
from speechlm2_jax.layers.linear import Linear, zeros
from speechlm2_jax.layers.module import param
from speechlm2_jax.layers.norms import LayerNorm
from speechlm2_jax.layers.words import floats
from speechlm2_jax.perception.batch_norm import BatchNorm, Statistics
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frame_mask import FrameMask
from speechlm2_jax.perception.frames import is_within
from speechlm2_jax.perception.group_norm import GroupNorm
from speechlm2_jax.perception.initializers import uniform
from speechlm2_jax.perception.self_attention import RelPosSelfAttention
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain


@register_pytree
@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Inputs that all layers of one forward pass share."""

    frame_mask: FrameMask
    present: Bool[Array, "B T"]
    """Frames that batch and group norm count: the real ones, or with `nemo_exact` NeMo's."""
    train: bool = field(default=False, metadata={"static": True})
    """Whether batch norm uses the statistics of this batch."""
    tied_biases: tuple[Float[Array, "N H"], Float[Array, "N H"]] | None = None


class FeedForward(nnx.Module):
    """Linear, SiLU, dropout, Linear."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        width, hidden = config.d_model, config.d_model * config.ff_expansion_factor
        self.rate = config.dropout
        self.hidden = Linear(width, hidden, axes=("mlp", "embed"), rngs=rngs, bias=config.use_bias)
        self.output = Linear(hidden, width, axes=("embed", "mlp"), rngs=rngs, bias=config.use_bias)

    def __call__(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Transforms each frame by itself. Given `rngs`, dropout is on."""
        return self.output(dropout(jax.nn.silu(self.hidden(x)), self.rate, rngs))


class DepthwiseConv(nnx.Module):
    """Depthwise convolution over time; weight [D, k].

    A sum of k shifted products: XLA's grouped convolution is several times slower on CPU.
    """

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.context = config.conv_context
        size = config.conv_kernel_size
        self.weight = param(rngs, (config.d_model, size), ("conv", "conv"), uniform(size))
        self.bias = param(rngs, (config.d_model,), ("norm",), zeros) if config.use_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Convolves with zero padding, so that T frames in give T frames out."""
        return self.valid(jnp.pad(x, ((0, 0), self.context, (0, 0))))

    def valid(self, padded: Float[Array, "B T2 D"]) -> Float[Array, "B T D"]:
        """Convolves without padding (mode "valid"): k - 1 frames fewer come out."""
        weight = self.weight[...].astype(padded.dtype)
        length = padded.shape[1] - weight.shape[1] + 1
        y = padded[:, :length] * weight[None, None, :, 0]
        for tap in range(1, weight.shape[1]):
            y = y + padded[:, tap : tap + length] * weight[None, None, :, tap]
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None, None]


class ConvolutionModule(nnx.Module):
    """Pointwise to 2 D channels, GLU, depthwise convolution over time, norm, SiLU, pointwise."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        width, bias = config.d_model, config.use_bias
        # not sharded over tensor-parallel devices: sharding the joint [2 D] axis would put value
        # and gate of a channel on different devices
        self.pointwise_in = Linear(width, 2 * width, axes=(None, "embed"), rngs=rngs, bias=bias)
        self.depthwise = DepthwiseConv(config, rngs=rngs)
        self.norm = _make_norm(config, rngs)
        self.pointwise_out = Linear(width, width, axes=("embed", "mlp"), rngs=rngs, bias=bias)

    def __call__(
        self, x: Float[Array, "B T D"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """Convolves. Padding is zeroed first, so it never reaches a real frame."""
        x = self.depthwise(self.gated(x, is_within(inputs.frame_mask.lengths, x.shape[1])))
        statistics: Statistics = {}
        if isinstance(self.norm, BatchNorm):
            x, statistics = self.norm(x, inputs.present if inputs.train else None)
        elif isinstance(self.norm, GroupNorm):
            x = self.norm(x, inputs.present)
        else:
            x = self.norm(x)
        return self.pointwise_out(jax.nn.silu(x)), statistics

    def gated(self, x: Float[Array, "B T D"], is_real: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Computes the input of the depthwise convolution: GLU output, zero where not real."""
        value, gate = self._halves(x)
        return jnp.where(is_real[..., None], value * jax.nn.sigmoid(gate), jnp.zeros((), x.dtype))

    def after_conv(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Runs what follows the depthwise convolution, in evaluation mode.

        Raises ValueError for group norm, which needs whole clips.
        """
        if isinstance(self.norm, GroupNorm):
            raise ValueError("group norm needs whole clips; it cannot run in a stream")
        x = self.norm(x)[0] if isinstance(self.norm, BatchNorm) else self.norm(x)
        return self.pointwise_out(jax.nn.silu(x))

    def _halves(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Computes value and gate, [B, T, D] each, by one matmul (einsum axis g: which of both)."""
        shape = (2, x.shape[-1], x.shape[-1])
        weight = constrain(floats(self.pointwise_in.weight[...], x.dtype), None, None)
        weight = constrain(weight.reshape(shape), None, "mlp", None)
        y = jnp.einsum("btd,ghd->btgh", x, weight)
        if self.pointwise_in.bias is not None:
            y = y + self.pointwise_in.bias[...].astype(x.dtype).reshape(1, 1, *shape[:2])
        y = constrain(y, "clips", "frames", None, "act_mlp")
        return y[:, :, 0], y[:, :, 1]


def _make_norm(config: FastConformerConfig, rngs: nnx.Rngs) -> BatchNorm | GroupNorm | LayerNorm:
    if config.norm_groups:
        return GroupNorm(config.d_model, config.norm_groups, rngs=rngs)
    return {"batch_norm": BatchNorm, "layer_norm": LayerNorm}[config.conv_norm_type](
        config.d_model, rngs=rngs
    )


class ConformerLayer(nnx.Module):
    """Four pre-norm residual blocks and a final layer norm."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.feed_forward_in_norm = LayerNorm(config.d_model, rngs=rngs)
        self.feed_forward_in = FeedForward(config, rngs=rngs)
        self.attention_norm = LayerNorm(config.d_model, rngs=rngs)
        self.attention = RelPosSelfAttention(config, rngs=rngs)
        self.conv_norm = LayerNorm(config.d_model, rngs=rngs)
        self.conv = ConvolutionModule(config, rngs=rngs)
        self.feed_forward_out_norm = LayerNorm(config.d_model, rngs=rngs)
        self.feed_forward_out = FeedForward(config, rngs=rngs)
        self.output_norm = LayerNorm(config.d_model, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: LayerInputs,
        rngs: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """Returns the new frames and the new batch-norm statistics. Given `rngs`, dropout is on."""
        dropout_rngs = [fold_rngs(rngs, number) for number in range(7)]

        def add(x: Array, update: Array, number: int) -> Array:
            return x + dropout(update, self.rate, dropout_rngs[number])

        update = self.feed_forward_in(self.feed_forward_in_norm(x), dropout_rngs[0])
        x = add(x, 0.5 * update, 1)
        update = self.attention(
            self.attention_norm(x),
            inputs.frame_mask,
            tied_biases=inputs.tied_biases,
            rngs=dropout_rngs[2],
        )
        x = add(x, update, 3)
        update, statistics = self.conv(self.conv_norm(x), inputs)
        x = add(x, update, 4)
        update = self.feed_forward_out(self.feed_forward_out_norm(x), dropout_rngs[5])
        x = add(x, 0.5 * update, 6)
        return self.output_norm(x), {f"conv.norm.{k}": v for k, v in statistics.items()}
