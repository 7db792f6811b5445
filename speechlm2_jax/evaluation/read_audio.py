"""Recordings on their way to the model: read ahead, longest first, cut where they are too long."""

import math
from collections import deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.inference.long_form.chunked import row_number
from speechlm2_jax.inference.long_form.chunks import Chunk, cut

READERS = 4


@dataclass(frozen=True, kw_only=True)
class EvaluationClip:
    """What the model hears at once: a recording, or one chunk of it."""

    index: int
    """Of the utterance among the inputs."""
    samples: np.ndarray
    number: int = 0
    """Of the chunk."""
    chunks: tuple[Chunk, ...]
    """All chunks of the recording."""
    draw: int = 0
    """The number by which random draws go, whatever was answered before."""

    @property
    def recording_samples(self) -> int:
        """Length of the whole recording."""
        return self.chunks[-1].end


def clips(
    utterances: Sequence[Utterance],
    *,
    ahead: int,
    rate_hz: int,
    max_s: float | None,
    answered: Container[int] = (),
) -> Iterator[list[EvaluationClip] | tuple[int, AudioError]]:
    """The clips of each utterance, longest first, or what is wrong with it.

    `ahead` recordings are read while others are answered, fewer where they are longer than `max_s`
    seconds: as many as `ahead` of that length, by the durations that are declared. One of more than
    `max_s` seconds gives several clips, in order. Those of `answered` are left out.
    """
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration_s)
    places = {index: place for place, index in enumerate(order)}
    waiting = deque(index for index in order if index not in answered)
    reading: deque[tuple[int, Future[np.ndarray]]] = deque()
    most_s = math.inf if max_s is None else ahead * max_s
    held_s = 0.0
    pool = ThreadPoolExecutor(READERS)
    try:
        while waiting or reading:
            while waiting and len(reading) < ahead:
                next_s = utterances[waiting[0]].duration_s
                if reading and held_s + next_s > most_s:
                    break
                held_s += next_s
                reading.append((waiting[0], pool.submit(utterances[waiting[0]].read, rate_hz)))
                waiting.popleft()
            index, future = reading.popleft()
            held_s -= utterances[index].duration_s
            try:
                wave = future.result()
            except AudioError as error:
                yield index, error
                continue
            yield _cut(index, wave, places[index], rate_hz, max_s)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # nobody waits after Ctrl-C


def _cut(
    index: int, wave: np.ndarray, place: int, rate_hz: int, max_s: float | None
) -> list[EvaluationClip]:
    chunks = tuple(cut(wave, rate_hz=rate_hz, max_s=max_s))
    return [
        EvaluationClip(
            index=index,
            samples=wave[c.start : c.end],
            number=n,
            chunks=chunks,
            draw=row_number(place, n),
        )
        for n, c in enumerate(chunks)
    ]
