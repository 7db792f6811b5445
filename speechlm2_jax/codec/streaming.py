"""Decoding a stream: each causal convolution remembers the last steps that it saw."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from speechlm2_jax.codec.boundary import PaddedSequence, Signal
from speechlm2_jax.codec.decoder import HiFiGANDecoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecoderStream:
    """What a decoder has seen of a batch of streams, in the order in which its layers ask for it.

    All zeros where a stream begins: a row is started anew by setting it to zero.
    """

    history: tuple[Float[Array, "B _ _"], ...]


class StreamBoundary:
    """Edges of one step of a stream: before it lie the steps seen last, and all steps are real."""

    def __init__(self, history: Iterator[Array] | None):
        self._history = history
        self.next_history: list[Array] = []
        """The steps to remember; zeros are taken for seen if nothing was given."""

    def pad(self, x: Signal, before: int, after: int, mode: str) -> PaddedSequence:
        """Puts the steps seen last before x, and remembers its own last."""
        if after:
            raise ValueError("a layer that looks ahead cannot decode a stream")
        shape = (x.shape[0], before, x.shape[2])
        x = jnp.concatenate(
            [jnp.zeros(shape) if self._history is None else next(self._history), x], 1
        )
        self.next_history.append(x[:, x.shape[1] - before :])
        return PaddedSequence(x)

    def mask_padding(self, x: Signal) -> Signal:
        """Leaves x as it is."""
        return x

    def downsampled(self, rate: int) -> "StreamBoundary":
        """The same edges."""
        return self

    def upsampled(self, rate: int) -> "StreamBoundary":
        """The same edges."""
        return self


def start(decoder: HiFiGANDecoder, batch: int) -> DecoderStream:
    """Makes the state of `batch` streams that have not begun.

    Raises ValueError for a decoder that looks ahead.
    """
    if not decoder.config.is_causal:
        raise ValueError(
            "only a causal decoder (CausalHiFiGANDecoder) decodes a stream; this codec's looks "
            "ahead: decode whole recordings with `decode`"
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
