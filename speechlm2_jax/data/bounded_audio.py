"""Reads a recording up to a limit, in one pass and block by block.

Memory holds the samples at the wanted rate, and of the file's own rate a block only. A few bytes of
FLAC may hold hours of silence at hundreds of kilohertz.
"""

from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import check_samples, one_channel
from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.audio_files import AudioFile, open_audio
from speechlm2_jax.data.stream_resampler import StreamResampler

_BLOCK_SAMPLES = 1 << 20


class TooLongAudio(NamedTuple):
    """A recording beyond the limit; the rest of it was not decoded."""

    seconds: float
    is_whole: bool
    """Whether `seconds` is its length, and not only what was counted before it was given up."""


def read_bounded(
    source: str | Path | BufferedIOBase, *, sample_rate_hz: int, max_s: float
) -> Float[np.ndarray, " S"] | TooLongAudio:
    """Reads a whole recording as `read_audio` does, unless it is longer than `max_s` seconds.

    Raises AudioError for a recording that cannot be used, with its cause.
    """
    with open_audio(source) as file:
        seconds = (file.frames or 0) / file.rate_hz
        if seconds > max_s:
            return TooLongAudio(seconds, True)
        blocks = _MonoBlocks(file, source, max_s)
        waves = list(resample_blocks(blocks, file.rate_hz, sample_rate_hz))
        promised = 0 if file.is_lossy else file.frames or 0
    if blocks.is_too_long:
        return TooLongAudio(blocks.samples / file.rate_hz, False)
    if blocks.samples < promised:
        raise AudioError(
            f"{source}: {blocks.samples / file.rate_hz:.3f} s of audio, declared {seconds:.3f} s",
            cause="truncated" if blocks.samples else "empty",
        )
    wave = waves[0] if len(waves) == 1 else np.concatenate([np.zeros(0, np.float32), *waves])
    return check_samples(wave, source, are_finite=file.rate_hz == sample_rate_hz)


class _MonoBlocks:
    """The blocks of a file as the mean of its channels, checked and counted, up to a limit."""

    def __init__(self, file: AudioFile, source: object, max_s: float) -> None:
        self._file, self._source = file, source
        self._most = max_s * file.rate_hz
        self.samples = 0

    @property
    def is_too_long(self) -> bool:
        """Whether there are more samples than the limit allows."""
        return self.samples > self._most

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self._file.blocks(0, None):
            self.samples += len(block)
            if self.is_too_long:
                return
            wave = one_channel(block, None, self._source)
            yield check_samples(wave, self._source, are_finite=self._file.is_integer)


def resample_blocks(
    waves: Iterable[Float[np.ndarray, " _"]], from_hz: int, to_hz: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Changes the rate of samples that come in blocks. Joined they are those of `resample`."""
    if from_hz == to_hz:
        yield from waves
        return
    resampler, parts, held = StreamResampler(from_hz, to_hz), list[np.ndarray](), 0
    for wave in waves:
        parts.append(wave)
        held += len(wave)
        if held >= _BLOCK_SAMPLES:
            yield resampler.push(np.concatenate(parts))
            parts, held = [], 0
    if parts:
        yield resampler.push(np.concatenate(parts))
    yield resampler.finish()
