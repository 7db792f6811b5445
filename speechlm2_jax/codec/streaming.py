"""Decoding a stream: each causal convolution remembers the last steps that it saw."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from speechlm2_jax.codec.boundary import PaddedSequence, Steps
from speechlm2_jax.codec.decoder import HiFiGANDecoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecoderStream:
    """What a decoder has seen of a batch of streams, in the order in which its layers ask for it.

    All zeros where a stream begins: a row is started anew by setting it to zero.
    """

    seen: tuple[Float[Array, "B _ _"], ...]


class StreamEdges:
    """Edges of one step of a stream: before it lie the steps seen last, and all steps are real."""

    def __init__(self, seen: Iterator[Array] | None):
        self._seen = seen
        self.kept: list[Array] = []
        """The steps to remember; zeros are taken for seen if nothing was given."""

    def extend(self, x: Steps, before: int, after: int, mode: str) -> PaddedSequence:
        """Puts the steps seen last before x, and remembers its own last."""
        if after:
            raise ValueError("a layer that looks ahead cannot decode a stream")
        shape = (x.shape[0], before, x.shape[2])
        x = jnp.concatenate([jnp.zeros(shape) if self._seen is None else next(self._seen), x], 1)
        self.kept.append(x[:, x.shape[1] - before :])
        return PaddedSequence(x)

    def silence(self, x: Steps) -> Steps:
        """Leaves x as it is."""
        return x

    def slower(self, rate: int) -> "StreamEdges":
        """The same edges."""
        return self

    def faster(self, rate: int) -> "StreamEdges":
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
        edges = StreamEdges(None)
        decoder(jnp.zeros((batch, 1, decoder.config.input_dim)), edges)
        return tuple(edges.kept)

    return DecoderStream(seen=tuple(jnp.zeros(s.shape) for s in jax.eval_shape(run)))


def advance(
    decoder: HiFiGANDecoder, stream: DecoderStream, frames: Steps
) -> tuple[Float[Array, "B S"], DecoderStream]:
    """Decodes the next frames of each stream."""
    edges = StreamEdges(iter(stream.seen))
    audio, _ = decoder(frames, edges)
    return audio[..., 0], DecoderStream(seen=tuple(edges.kept))
