"""Transcribes recordings with one model, a group at a time: reads ahead, writes, shows progress."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.audio_files import shown_path
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.transcription.inputs import GivenRecording
from speechlm2_jax.transcription.opening import OpenedModel
from speechlm2_jax.transcription.outputs import OutputError, Outputs
from speechlm2_jax.transcription.progress import AudioProgress

GROUP_S = 600.0
"""Seconds of audio that are read before they are transcribed together, or one longer recording."""


@dataclass
class Transcribed:
    """What was transcribed."""

    files: int = 0
    audio_s: float = 0.0
    failed: int = 0


def transcribe_all(
    sources: Sequence[GivenRecording],
    model: OpenedModel,
    outputs: Outputs | None,
    progress: AudioProgress,
    *,
    group_size: int,
) -> Transcribed:
    """Transcribes and writes; `outputs` None prints the texts.

    A recording that cannot be read, or whose transcript cannot be written, is named on standard
    error and counted; the others are transcribed.
    """
    if outputs is None:
        return _transcribe(sources, model, None, progress, group_size)
    outputs.begin()
    try:
        return _transcribe(sources, model, outputs, progress, group_size)
    finally:
        outputs.close()


def _transcribe(
    sources: Sequence[GivenRecording],
    model: OpenedModel,
    outputs: Outputs | None,
    progress: AudioProgress,
    group_size: int,
) -> Transcribed:
    totals = Transcribed()
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as pool:
        groups = _groups(sources, group_size)
        waiting = _read(pool, next(groups, []), model.sampling_rate)
        while waiting:
            group = waiting
            waiting = _read(pool, next(groups, []), model.sampling_rate)
            read = list(_readable(group, totals, progress))
            for (source, wave), text in zip(read, _texts(model, read), strict=True):
                seconds = len(wave) / model.sampling_rate
                try:
                    _write(source, text, outputs, progress)
                except OutputError as error:
                    _leave_out(source, str(error), totals, progress)
                    continue
                totals.files, totals.audio_s = totals.files + 1, totals.audio_s + seconds
                progress.update(seconds)
    return totals


def _write(
    source: GivenRecording, text: Transcript, outputs: Outputs | None, progress: AudioProgress
) -> None:
    if outputs is None:
        progress.print(text.text)
    else:
        outputs.write(source, text)


def _leave_out(
    source: GivenRecording, reason: str, totals: Transcribed, progress: AudioProgress
) -> None:
    """Names a recording that has no transcript, and counts it."""
    totals.failed += 1
    progress.print(f"{shown_path(source.name)}: left out: {reason}", file=sys.stderr)
    progress.update(0.0)


_Reading = list[tuple[GivenRecording, "Future[np.ndarray]"]]


def _texts(
    model: OpenedModel, read: Sequence[tuple[GivenRecording, np.ndarray]]
) -> Sequence[Transcript]:
    return model.transcribe([wave for _, wave in read]) if read else []


def _read(pool: ThreadPoolExecutor, group: Sequence[GivenRecording], rate_hz: int) -> _Reading:
    """Starts to read a group."""
    return [(source, pool.submit(source.utterance.read, rate_hz)) for source in group]


def _readable(
    group: _Reading, totals: Transcribed, progress: AudioProgress
) -> Iterator[tuple[GivenRecording, np.ndarray]]:
    """The recordings of a group that can be read."""
    for source, reading in group:
        try:
            yield source, reading.result()
        except AudioError as error:
            reason = str(error).removeprefix(f"{shown_path(source.name)}: ")
            _leave_out(source, reason, totals, progress)


def _groups(sources: Sequence[GivenRecording], size: int) -> Iterator[list[GivenRecording]]:
    """Up to `size` recordings of together at most GROUP_S, in order, or one longer recording.

    One whose duration is not known before it is read, as of an address, may be long: it is alone.
    """
    group: list[GivenRecording] = []
    seconds = 0.0
    for source in sources:
        own_s = source.utterance.duration_s or GROUP_S
        longer = seconds + own_s
        if group and (len(group) == size or longer > GROUP_S):
            yield group
            group, longer = [], own_s
        group.append(source)
        seconds = longer
    if group:
        yield group
