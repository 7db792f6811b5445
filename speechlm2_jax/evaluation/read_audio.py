"""Reads recordings ahead, longest first, and splits long ones into chunks."""

import contextlib
import math
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.read_ahead import READERS, read_ahead
from speechlm2_jax.evaluation.dialogs import EvaluatedDialog, joined
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.progress import ProgressDisplay
from speechlm2_jax.inference.long_form.chunked import draw_number
from speechlm2_jax.inference.long_form.chunks import Chunk, cut

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class EvaluationClip:
    """One model input: a recording, one chunk of it, or a conversation."""

    index: int
    """Position of the utterance among the inputs."""
    samples: Float[np.ndarray, " S"]
    """Of a conversation, all recordings one after another."""
    number: int = 0
    """Number of the chunk."""
    chunks: tuple[Chunk, ...]
    """All chunks of the recording."""
    draw: int = 0
    """Seeds random sampling; the same for a clip whether the evaluation was resumed or not."""
    dialog: EvaluatedDialog | None = None
    """The conversation, if the input is one; it is never split into chunks."""
    recordings: tuple[Float[np.ndarray, " _"], ...] = ()
    """Those of the conversation."""

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
    done: Container[int] = (),
) -> Iterator[list[EvaluationClip] | tuple[int, AudioError]]:
    """Yields the clips of each utterance, longest first, or (index, error) if it cannot be read.

    Up to `ahead` recordings are read in the background, of together at most `ahead * max_s`
    declared seconds (and always at least one). A recording longer than `max_s` seconds gives
    several clips, in order; a conversation gives one. Utterances whose index is in `done` are
    skipped.
    """
    order = longest_first([utterance.duration_s for utterance in utterances])
    ranks = {index: rank for rank, index in enumerate(order)}
    reading = read_ahead(
        [index for index in order if index not in done],
        lambda index: recordings_of(utterances[index], rate_hz),
        ahead=ahead,
        cost=lambda index: utterances[index].duration_s,
        most=math.inf if max_s is None else ahead * max_s,
    )
    with contextlib.closing(reading):
        for index, future in reading:
            try:
                recordings = future.result()
            except AudioError as error:
                yield index, error
                continue
            if (dialog := utterances[index].dialog) is not None:
                yield [_whole(index, dialog, recordings, ranks[index])]
            else:
                yield _cut(index, recordings[0], ranks[index], rate_hz, max_s)


def longest_first(durations_s: Sequence[float]) -> list[int]:
    """The indices of recordings, longest first; those of equal length in order."""
    return sorted(range(len(durations_s)), key=lambda i: -durations_s[i])


def recordings_of(utterance: Utterance, rate_hz: int) -> tuple[Float[np.ndarray, " _"], ...]:
    """The samples of an utterance; several of a conversation, or none. Raises AudioError."""
    if utterance.dialog is not None:
        return utterance.dialog.read(rate_hz)
    return (utterance.read(rate_hz),)


def read_batches(
    utterances: Sequence[Utterance],
    order: Sequence[int],
    read: Callable[[Utterance], R | None],
    batch_size: int,
    *,
    what: str,
) -> Iterator[dict[int, R]]:
    """Reads utterances in this order by threads, and shows progress under the name `what`.

    Each batch has what `read` returns, by index. Those for which it is None are left out, so that
    a batch may have fewer than `batch_size`, or none.
    """
    with ThreadPoolExecutor(READERS) as pool, ProgressDisplay(len(order), what=what) as progress:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found = pool.map(read, (utterances[i] for i in chosen))
            yield {i: one for i, one in zip(chosen, found, strict=True) if one is not None}
            progress.update(len(chosen))


def _whole(
    index: int, dialog: EvaluatedDialog, recordings: tuple[np.ndarray, ...], rank: int
) -> EvaluationClip:
    samples = joined(recordings)
    return EvaluationClip(
        index=index,
        samples=samples,
        chunks=(Chunk(0, len(samples)),),
        draw=draw_number(rank, 0),
        dialog=dialog,
        recordings=recordings,
    )


def _cut(
    index: int, wave: Float[np.ndarray, " S"], rank: int, rate_hz: int, max_s: float | None
) -> list[EvaluationClip]:
    chunks = tuple(cut(wave, rate_hz=rate_hz, max_s=max_s))
    return [
        EvaluationClip(
            index=index,
            samples=wave[c.start : c.end],
            number=n,
            chunks=chunks,
            draw=draw_number(rank, n),
        )
        for n, c in enumerate(chunks)
    ]
