"""Long audio in parts: the encoder sees each part of a clip by itself, its frames are put together.

A clip is cut into parts of one size from its start; a tail too short to normalise stays with the
part before it (NeMo SpeechLM2, encode_audio_with_optional_chunking). Memory and attention then grow
with the length of the clip, not with its square.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.perception.log_mel import LogMelConfig

_MOST_HOPS = 16


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Sizes in samples."""

    size: int
    """Of every part but the last."""
    shortest: int
    """A tail below it belongs to the part before."""

    @classmethod
    def of(cls, seconds: float, log_mel: LogMelConfig) -> "Chunking":
        """Takes NeMo's `encoder_chunk_size_seconds`; a tail must have two frames of features."""
        hops = range(1, _MOST_HOPS + 1)
        shortest = next(
            (n for h in hops if log_mel.frame_count(n := h * log_mel.hop_samples) >= 2),
            (_MOST_HOPS + 1) * log_mel.hop_samples,
        )
        size = max(1, round(seconds * log_mel.sample_rate))
        return cls(size=max(size, shortest), shortest=shortest)

    def chunks(self, samples: int) -> tuple[int, ...]:
        """Lengths of the parts of a clip; an empty clip is one empty part."""
        count = self.whole_chunks(samples)
        return (*(self.size,) * count, samples - count * self.size)

    def whole_chunks(self, samples: Any) -> Any:
        """How many parts come before the last: an int, or an array of them."""
        count = (samples - self.shortest) // self.size
        return count * (count > 0)

    def width(self, samples: int) -> int:
        """Samples of the longest part that an audio array of `samples` may hold."""
        return min(samples, self.size + self.shortest - 1)


def split_chunks(
    audio: Float[Array, "B S"], lengths: Int[Array, " B"], chunking: Chunking
) -> tuple[Float[Array, "B K W"], Int[Array, "B K"]]:
    """Cuts clips into parts [B, K, W] and says how long each is; empty past a clip's end."""
    samples = audio.shape[1]
    chunks, width = len(chunking.chunks(samples)), chunking.width(samples)
    missing = (chunks - 1) * chunking.size + width - samples
    padded = jnp.pad(audio, ((0, 0), (0, max(missing, 0))))
    starts = [k * chunking.size for k in range(chunks)]
    chunk_audio = jnp.stack([padded[:, start : start + width] for start in starts], axis=1)
    last = chunking.whole_chunks(lengths)[:, None]
    index = jnp.arange(chunks)[None]
    last_length = lengths[:, None] - last * chunking.size
    chunk_lengths = jnp.where(index < last, chunking.size, jnp.where(index == last, last_length, 0))
    return chunk_audio, chunk_lengths.astype(jnp.int32)


def join_chunks(
    frames: Float[Array, "B K F D"],
    lengths: Int[Array, "B K"],
    *,
    last: Int[Array, " B"],
    frames_per_chunk: int,
    capacity: int,
) -> tuple[Float[Array, "B F2 D"], Int[Array, " B"]]:
    """Puts the frames of the parts of each clip one after the other, in `capacity` places.

    Every part before number `last` has `frames_per_chunk` frames.
    """
    batch, _, max_frames, width = frames.shape
    position = jnp.arange(capacity)[None]
    chunk = jnp.minimum(position // max(frames_per_chunk, 1), last[:, None])
    index = chunk * max_frames + jnp.minimum(position - chunk * frames_per_chunk, max_frames - 1)
    flat = frames.reshape(batch, -1, width)
    joined = jax.vmap(lambda table, i: jnp.take(table, i, axis=0))(flat, index)
    return joined, jnp.sum(lengths, axis=1)


def chunk_rngs(rngs: Key[Array, " B"] | None, chunks: int) -> Key[Array, " BK"] | None:
    """One key per part, from the clip's own and the part's number."""
    if rngs is None:
        return None
    indices = jnp.arange(chunks)
    return jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(indices))(rngs).reshape(
        -1
    )
