"""Long audio in chunks: chunks are encoded one by one, then their frames are concatenated.

All chunks have one size, but the last. A tail that is too short to normalise joins the chunk before
it (NeMo SpeechLM2, encode_audio_with_optional_chunking). Memory and attention then grow linearly
with the length of the clip, not quadratically.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.arrays import Size
from speechlm2_jax.perception.log_mel import LogMelConfig

_MOST_HOPS = 16


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """Chunk sizes in samples."""

    size: int
    """Length of every chunk but the last."""
    shortest: int
    """A shorter tail joins the chunk before it."""

    @classmethod
    def of(cls, seconds: float, log_mel: LogMelConfig) -> "Chunking":
        """Reads NeMo's `encoder_chunk_size_seconds`; `shortest` gives at least two mel frames."""
        hops = range(1, _MOST_HOPS + 1)
        shortest = next(
            (n for h in hops if log_mel.frame_count(n := h * log_mel.hop_samples) >= 2),
            (_MOST_HOPS + 1) * log_mel.hop_samples,
        )
        size = max(1, round(seconds * log_mel.sample_rate))
        return cls(size=max(size, shortest), shortest=shortest)

    def chunks(self, samples: int) -> tuple[int, ...]:
        """Returns the lengths of the chunks of a clip. An empty clip is one empty chunk."""
        count = self.whole_chunks(samples)
        return (*(self.size,) * count, samples - count * self.size)

    def whole_chunks(self, samples: Size) -> Size:
        """Counts the chunks before the last one. Takes an int or an integer array."""
        count = (samples - self.shortest) // self.size
        return count * (count > 0)

    def width(self, samples: int) -> int:
        """Returns the longest chunk, in samples, of any clip in an audio array [B, samples]."""
        return min(samples, self.size + self.shortest - 1)


def split_chunks(
    audio: Float[Array, "B S"], lengths: Int[Array, " B"], chunking: Chunking
) -> tuple[Float[Array, "B K W"], Int[Array, "B K"]]:
    """Splits clips into K chunks [B, K, W] and returns their lengths; 0 past the clip's end."""
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
    """Concatenates the frames of the chunks of each clip into [B, capacity, D].

    `last` is the index of a clip's last chunk; each chunk before it has `frames_per_chunk` frames.
    """
    batch, _, max_frames, width = frames.shape
    position = jnp.arange(capacity)[None]
    chunk = jnp.minimum(position // max(frames_per_chunk, 1), last[:, None])
    index = chunk * max_frames + jnp.minimum(position - chunk * frames_per_chunk, max_frames - 1)
    flat = frames.reshape(batch, -1, width)
    joined = jax.vmap(lambda table, i: jnp.take(table, i, axis=0))(flat, index)
    return joined, jnp.sum(lengths, axis=1)


def chunk_rngs(rngs: Key[Array, " B"] | None, chunks: int) -> Key[Array, " BK"] | None:
    """Derives one random key per chunk: the clip's key folded with the chunk's index."""
    if rngs is None:
        return None
    indices = jnp.arange(chunks)
    return jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(indices))(rngs).reshape(
        -1
    )
