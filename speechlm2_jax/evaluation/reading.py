"""Recordings on their way to the model: read ahead, longest first, cut where they are too long."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.models.long_audio import Chunk, cut

READERS = 4


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What the model hears at once: a recording, or one chunk of it."""

    index: int
    """Of the utterance among the inputs."""
    samples: np.ndarray
    number: int = 0
    """Of the chunk."""
    chunks: tuple[Chunk, ...]
    """All chunks of the recording."""

    @property
    def recording_samples(self) -> int:
        """Length of the whole recording."""
        return self.chunks[-1].end


def clips(
    utterances: Sequence[Utterance], *, ahead: int, rate_hz: int, max_s: float | None
) -> Iterator[list[Clip] | tuple[int, AudioError]]:
    """The clips of each utterance, longest first, or what is wrong with it.

    `ahead` recordings are read while others are answered; one of more than `max_s` seconds gives
    several clips, in order.
    """
    order = iter(sorted(range(len(utterances)), key=lambda i: -utterances[i].duration_s))
    with ThreadPoolExecutor(READERS) as pool:

        def begun(count: int) -> Iterator[tuple[int, Future[np.ndarray]]]:
            for i in itertools.islice(order, count):
                yield i, pool.submit(utterances[i].read, rate_hz)

        reading = deque(begun(ahead))
        while reading:
            index, future = reading.popleft()
            reading.extend(begun(1))
            try:
                wave = future.result()
            except AudioError as error:
                yield index, error
                continue
            chunks = tuple(cut(wave, rate_hz=rate_hz, max_s=max_s))
            yield [
                Clip(index=index, samples=wave[c.start : c.end], number=n, chunks=chunks)
                for n, c in enumerate(chunks)
            ]
