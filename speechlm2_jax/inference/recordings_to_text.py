"""From recordings of any length to transcripts with times; the model is a function of short clips.

- A recording longer than `max_audio_s` is cut at pauses. Stretches without speech have no text.
- A text in which the model repeats itself is generated again where the model can avoid that, and
  what is still repeated is written once. Both are logged.
- Words have times if there is an aligner; else a segment is a part of its recording.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from speechlm2_jax.inference.long_form.pauses import Stretch, cut_at_pauses
from speechlm2_jax.inference.long_form.repetition import has_loop, without_loop
from speechlm2_jax.inference.timed_text import Segment, Transcript, Word, segments_of

TIMESTAMPS = ("segment", "word")
ToTexts = Callable[[Sequence[np.ndarray]], list[str]]
"""Clips (float32 [S] at the model's rate) -> a text for each."""
ToWords = Callable[[Sequence[np.ndarray], Sequence[str], Sequence[float]], list[tuple[Word, ...]]]
"""Clips, their texts and the second at which each starts -> the words of each clip."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipFunctions:
    """What turns clips into texts, and texts into words with times."""

    rate_hz: int
    to_texts: ToTexts
    to_texts_again: ToTexts | None = None
    """Generates other texts for clips over which the model repeated itself."""
    to_words: ToWords | None = None
    """None: there is no aligner."""


class _Clip(NamedTuple):
    recording: int
    part: Stretch


def check_timestamps(timestamps: object) -> str | None:
    """`None`, "segment" or "word"; True is "word" as in NeMo. Raises ValueError for another."""
    if timestamps is None or timestamps is False:
        return None
    if timestamps is True:
        return "word"
    if timestamps not in TIMESTAMPS:
        raise ValueError(f"timestamps={timestamps!r} must be None, 'segment' or 'word'")
    return str(timestamps)


def transcribe_recordings(
    waves: Sequence[np.ndarray],
    functions: ClipFunctions,
    *,
    timestamps: str | None,
    max_audio_s: float | None,
    has_guards: bool = True,
) -> list[Transcript]:
    """Transcribes recordings (float32 [S]), in input order.

    Without `has_guards`, parts without speech are transcribed too and loops stay as they are.
    """
    rate_hz = functions.rate_hz
    clips = [
        _Clip(number, part)
        for number, wave in enumerate(waves)
        for part in cut_at_pauses(wave, rate_hz=rate_hz, max_s=max_audio_s)
        if part.has_speech or not has_guards
    ]
    audio = [waves[clip.recording][clip.part.start : clip.part.end] for clip in clips]
    texts = [text.strip() for text in functions.to_texts(audio)] if clips else []
    if has_guards:
        texts = _without_loops(audio, texts, functions)
    words: list[tuple[Word, ...]] = [()] * len(clips)
    if timestamps and functions.to_words is not None and clips:
        starts_s = [clip.part.start / rate_hz for clip in clips]
        words = functions.to_words(audio, texts, starts_s)
    made: list[list[tuple[Segment, ...]]] = [[] for _ in waves]
    joined: list[list[str]] = [[] for _ in waves]
    for clip, text, own in zip(clips, texts, words, strict=True):
        joined[clip.recording].append(text)
        made[clip.recording].append(_segments(clip.part, text, own, rate_hz) if timestamps else ())
    return [
        Transcript(
            " ".join(filter(None, joined[number])),
            segments=[segment for own in made[number] for segment in own],
            duration_s=len(wave) / rate_hz,
        )
        for number, wave in enumerate(waves)
    ]


def _segments(
    part: Stretch, text: str, words: tuple[Word, ...], rate_hz: int
) -> tuple[Segment, ...]:
    if words:
        return segments_of(words)
    if not text:
        return ()
    return (Segment(text=text, start=part.start / rate_hz, end=part.end / rate_hz),)


def _without_loops(
    audio: Sequence[np.ndarray], texts: list[str], functions: ClipFunctions
) -> list[str]:
    looping = [n for n, text in enumerate(texts) if has_loop(text)]
    if not looping:
        return texts
    again = functions.to_texts_again
    if again is not None:
        for n, text in zip(looping, again([audio[n] for n in looping]), strict=True):
            texts[n] = text.strip()
    log.warning(
        "the model repeated itself over %d of %d parts; repetitions are written once",
        *(len(looping), len(texts)),
    )
    return [without_loop(text) for text in texts]
