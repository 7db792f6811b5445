"""Stream decoding: the state holds the last inputs of each causal convolution."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from speechlm2_jax.codec.boundary import PaddedSequence, Signal
from speechlm2_jax.codec.decoder import HiFiGANDecoder
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class DecoderStream:
    """State of a batch of streams: the last inputs of each convolution, in the order of the layers.

    A new stream is all zeros, so zeroing one restarts it.
    """

    history: tuple[Float[Array, "B _ _"], ...]


class StreamBoundary:
    """Boundary of one streaming call: the last inputs come before it, and there is no padding."""

    def __init__(self, history: Iterator[Array] | None):
        self._history = history
        self.next_history: list[Array] = []
        """The inputs to keep for the next call, per convolution."""

    def pad(self, x: Signal, before: int, after: int, mode: str) -> PaddedSequence:
        """Prepends the last inputs to x (zeros without a history), and keeps those of x."""
        if after:
            raise ValueError("a convolution with right context cannot decode a stream")
        shape = (x.shape[0], before, x.shape[2])
        x = jnp.concatenate(
            [jnp.zeros(shape) if self._history is None else next(self._history), x], 1
        )
        self.next_history.append(x[:, x.shape[1] - before :])
        return PaddedSequence(x)

    def mask_padding(self, x: Signal) -> Signal:
        """Returns x: a stream has no padding."""
        return x

    def downsampled(self, rate: int) -> "StreamBoundary":
        """Returns self: a stream has no lengths."""
        return self

    def upsampled(self, rate: int) -> "StreamBoundary":
        """Returns self: a stream has no lengths."""
        return self


def start(decoder: HiFiGANDecoder, batch: int) -> DecoderStream:
    """Makes the state of `batch` new streams.

    Raises ValueError unless the decoder is causal.
    """
    if not decoder.config.is_causal:
        raise ValueError(
            "only a causal decoder (CausalHiFiGANDecoder) can decode a stream, and this codec's "
            "looks ahead; decode whole recordings with `decode`"
        )

    def run() -> tuple[Array, ...]:
        boundary = StreamBoundary(None)
        decoder(jnp.zeros((batch, 1, decoder.config.input_dim)), boundary)
        return tuple(boundary.next_history)

    return DecoderStream(history=tuple(jnp.zeros(s.shape) for s in jax.eval_shape(run)))


def advance(
    decoder: HiFiGANDecoder, stream: DecoderStream, frames: Signal
) -> tuple[Float[Array, "B S"], DecoderStream]:
    """Decodes the next frames of each stream."""
    boundary = StreamBoundary(iter(stream.history))
    audio, _ = decoder(frames, boundary)
    return audio[..., 0], DecoderStream(history=tuple(boundary.next_history))
