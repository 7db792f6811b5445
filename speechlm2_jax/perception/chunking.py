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

    def parts(self, samples: int) -> tuple[int, ...]:
        """Lengths of the parts of a clip; an empty clip is one empty part."""
        whole = self.whole_parts(samples)
        return (*(self.size,) * whole, samples - whole * self.size)

    def whole_parts(self, samples: Any) -> Any:
        """How many parts come before the last: an int, or an array of them."""
        whole = (samples - self.shortest) // self.size
        return whole * (whole > 0)

    def width(self, samples: int) -> int:
        """Samples of the longest part that an audio array of `samples` may hold."""
        return min(samples, self.size + self.shortest - 1)


def cut(
    audio: Float[Array, "B S"], lengths: Int[Array, " B"], chunking: Chunking
) -> tuple[Float[Array, "B K W"], Int[Array, "B K"]]:
    """Cuts clips into parts [B, K, W] and says how long each is; empty past a clip's end."""
    samples = audio.shape[1]
    parts, width = len(chunking.parts(samples)), chunking.width(samples)
    missing = (parts - 1) * chunking.size + width - samples
    padded = jnp.pad(audio, ((0, 0), (0, max(missing, 0))))
    starts = [k * chunking.size for k in range(parts)]
    pieces = jnp.stack([padded[:, start : start + width] for start in starts], axis=1)
    last = chunking.whole_parts(lengths)[:, None]
    number = jnp.arange(parts)[None]
    rest = lengths[:, None] - last * chunking.size
    sizes = jnp.where(number < last, chunking.size, jnp.where(number == last, rest, 0))
    return pieces, sizes.astype(jnp.int32)


def join(
    frames: Float[Array, "B K F D"],
    lengths: Int[Array, "B K"],
    *,
    last: Int[Array, " B"],
    per_part: int,
    capacity: int,
) -> tuple[Float[Array, "B F2 D"], Int[Array, " B"]]:
    """Puts the frames of the parts of each clip one after the other, in `capacity` places.

    Every part before number `last` has `per_part` frames.
    """
    batch, _, most, width = frames.shape
    place = jnp.arange(capacity)[None]
    part = jnp.minimum(place // max(per_part, 1), last[:, None])
    index = part * most + jnp.minimum(place - part * per_part, most - 1)
    flat = frames.reshape(batch, -1, width)
    joined = jax.vmap(lambda table, i: jnp.take(table, i, axis=0))(flat, index)
    return joined, jnp.sum(lengths, axis=1)


def chunk_rngs(rngs: Key[Array, " B"] | None, parts: int) -> Key[Array, " BK"] | None:
    """One key per part, from the clip's own and the part's number."""
    if rngs is None:
        return None
    numbers = jnp.arange(parts)
    return jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(numbers))(rngs).reshape(
        -1
    )
