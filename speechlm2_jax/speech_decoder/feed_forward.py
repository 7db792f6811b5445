"""The feed-forward of the speech decoder: two convolutions over time around a GELU."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from speechlm2_jax.layers.dropout import dropout
from speechlm2_jax.layers.linear import gathered
from speechlm2_jax.layers.module import Initializer, param
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain, platform
from speechlm2_jax.speech_decoder.attention import default_init, output_init
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig


@register_pytree
@dataclass(frozen=True, kw_only=True)
class ConvState:
    """The last k - 1 inputs of both convolutions; with a leading axis L for all layers."""

    hidden: Float[Array, "*layers B C D"]
    """[B, k - 1, D]."""
    output: Float[Array, "*layers B C F"]
    """[B, k - 1, F]."""


class CausalConvolution(nnx.Module):
    """Convolution over time without bias; weight [out, k, in].

    On TPU it is XLA's convolution: compiled for a v5e it reads a third of the bytes of a matmul
    over windows for one frame, and needs two thirds of its memory in training. Elsewhere it is one
    matmul over windows, which takes a tenth of the time for one frame on a CPU.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        size: int,
        *,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        init: Initializer,
    ):
        self.weight = param(rngs, (d_out, size, d_in), (axes[0], "conv", axes[1]), init)

    def __call__(self, x: Float[Array, "B S d_in"]) -> Float[Array, "B T d_out"]:
        """Convolves without padding: k - 1 frames fewer come out."""
        weight = gathered(self.weight, x.dtype)
        if platform() == "tpu":
            layout = ("NWC", "OWI", "NWC")
            return jax.lax.conv_general_dilated(x, weight, (1,), "VALID", dimension_numbers=layout)
        size = weight.shape[1]
        length = x.shape[1] - size + 1
        # taps on an axis of their own, so that the input channels can be sharded
        windows = jnp.stack([x[:, tap : tap + length] for tap in range(size)], axis=2)
        return jnp.einsum("btki,oki->bto", windows, weight)


class ConvFeedForward(nnx.Module):
    """output(gelu(hidden(x))), with padding zeroed before and after both convolutions."""

    def __init__(self, config: SpeechDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner, size = config.d_model, config.d_ffn, config.kernel_size
        self.hidden = CausalConvolution(
            width, inner, size, axes=("mlp", "embed"), rngs=rngs, init=default_init
        )
        self.output = CausalConvolution(
            inner, width, size, axes=("embed", "mlp"), rngs=rngs, init=output_init(config)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        *,
        rngs: Key[Array, " B"] | None = None,
        conv_state: ConvState | None = None,
    ) -> tuple[Float[Array, "B T D"], ConvState | None]:
        """Transforms whole sequences or, with `conv_state`, their next frames.

        Given `rngs`, dropout is on.
        """
        x = _zero(constrain(x, "batch", "tokens", "act_embed"), is_real)
        x, hidden_tail = self._with_context(x, None if conv_state is None else conv_state.hidden)
        inner = constrain(self.hidden(x), "batch", "tokens", "act_mlp")
        # padding stays zero, since gelu(0) = 0
        inner = jax.nn.gelu(_zero(inner, is_real), approximate=True)
        inner, output_tail = self._with_context(
            inner, None if conv_state is None else conv_state.output
        )
        out = constrain(self.output(inner), "batch", "tokens", "act_embed")
        out = dropout(_zero(out, is_real), self.config.p_dropout, rngs)
        if hidden_tail is None or output_tail is None:
            return out, None
        return out, ConvState(hidden=hidden_tail, output=output_tail)

    def _with_context(
        self, x: Float[Array, "B T D"], history: Float[Array, "B C D"] | None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B C D"] | None]:
        """Pads with zeros, or prepends the last inputs; returns the new ones, too."""
        reach = self.config.kernel_size - 1
        if history is not None:
            x = jnp.concatenate([history.astype(x.dtype), x], axis=1)
            return x, x[:, x.shape[1] - reach :]
        padding = (reach, 0) if self.config.is_causal else (reach // 2, reach // 2)
        return jnp.pad(x, ((0, 0), padding, (0, 0))), None


def _zero(x: Float[Array, "B T D"], is_real: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
    return jnp.where(is_real[..., None], x, jnp.zeros((), x.dtype))
