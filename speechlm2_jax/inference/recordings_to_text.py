"""From recordings of any length to transcripts with times; the model is a function of short clips.

- A recording longer than `max_audio_s` is cut at pauses. Stretches without speech have no text.
- Where a model can generate a text again without repetitions, as an LLM, a text in which it repeats
  itself is generated so, and what is still repeated is written once. Both are logged. Other models
  have no loops: eight equal words are eight words.
- Words have times if there is an aligner; else a segment is a part of its recording. With the
  timestamps "segment", the words of a segment are not kept.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import resample
from speechlm2_jax.inference.long_form.pauses import Stretch, cut_at_pauses
from speechlm2_jax.inference.long_form.repetition import has_loop, without_loop
from speechlm2_jax.inference.timed_text import Segment, Transcript, Word, segments_of
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.timestamps.word_times import word_times

TIMESTAMPS = ("segment", "word")


class ClipText(NamedTuple):
    """The text of a clip."""

    text: str
    confidences: tuple[float, ...] | None = None
    """Of each of its words, split at white space, by the model itself; None if not known."""


ToTexts = Callable[[Sequence[np.ndarray]], list[ClipText]]
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
    """Generates other texts for clips over which the model repeated itself; None: it never does."""
    has_confidences: bool = False
    """Whether confidences are the model's own: words without one do not get the aligner's."""
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
    cut = speech_parts if has_guards else cut_at_pauses
    clips = [
        _Clip(number, part)
        for number, wave in enumerate(waves)
        for part in cut(wave, rate_hz=rate_hz, max_s=max_audio_s)
    ]
    audio = [waves[clip.recording][clip.part.start : clip.part.end] for clip in clips]
    found = functions.to_texts(audio) if clips else []
    if has_guards:
        found = _without_loops(audio, found, functions)
    texts = [own.text for own in found]
    words: list[tuple[Word, ...]] = [()] * len(clips)
    if timestamps and functions.to_words is not None and any(map(str.strip, texts)):
        starts_s = [clip.part.start / rate_hz for clip in clips]
        timed = functions.to_words(audio, [text.strip() for text in texts], starts_s)
        words = timed
        if functions.has_confidences:
            words = [_confident(*own) for own in zip(timed, found, strict=True)]
    made: list[list[tuple[Segment, ...]]] = [[] for _ in waves]
    joined: list[list[str]] = [[] for _ in waves]
    for clip, text, own in zip(clips, texts, words, strict=True):
        joined[clip.recording].append(text)
        segments = part_segments(clip.part, text, own, rate_hz) if timestamps else ()
        made[clip.recording].append(
            _without_words(segments) if timestamps == "segment" else segments
        )
    return [
        Transcript(
            joined_texts(joined[number], as_it_is=not has_guards),
            segments=[segment for own in made[number] for segment in own],
            duration_s=len(wave) / rate_hz,
        )
        for number, wave in enumerate(waves)
    ]


def speech_parts(
    wave: Float[np.ndarray, " S"], *, rate_hz: int, max_s: float | None
) -> list[Stretch]:
    """The parts of a recording that the model is given: cut at pauses, with speech."""
    return [p for p in cut_at_pauses(wave, rate_hz=rate_hz, max_s=max_s) if p.has_speech]


def joined_texts(texts: Sequence[str], *, as_it_is: bool = False) -> str:
    """The text of a recording: all parts that have one; a single part may stay `as_it_is`."""
    if as_it_is and len(texts) == 1:
        return texts[0]
    return " ".join(filter(None, map(str.strip, texts)))


def part_segments(
    part: Stretch, text: str, words: tuple[Word, ...], rate_hz: int
) -> tuple[Segment, ...]:
    """The segments of a part: made of its words, or one without them."""
    if words:
        return segments_of(words)
    if not text.strip():
        return ()
    return (Segment(text=text.strip(), start=part.start / rate_hz, end=part.end / rate_hz),)


def _without_words(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    return tuple(replace(segment, words=()) for segment in segments)


def _without_loops(
    audio: Sequence[np.ndarray], found: list[ClipText], functions: ClipFunctions
) -> list[ClipText]:
    """The texts without loops, if the model can generate others."""
    again = functions.to_texts_again
    looping = [n for n, own in enumerate(found) if has_loop(own.text)]
    if again is None or not looping:
        return found
    for n, own in zip(looping, again([audio[n] for n in looping]), strict=True):
        found[n] = own
    still = [n for n in looping if has_loop(found[n].text)]
    for n in still:
        found[n] = ClipText(without_loop(found[n].text))
    ends = f"; in {len(still)} it did again, and repetitions are written once" if still else ""
    log.warning(
        "the model repeated itself over %d of %d parts, which were generated again%s",
        *(len(looping), len(found), ends),
    )
    return found


def words_by(find_aligner: Callable[[], Aligner | None], rate_hz: int) -> ToWords:
    """A function that finds the words of clips at `rate_hz` in time.

    The aligner is opened when it is needed. Without one, clips have no words.
    """

    def to_words(
        clips: Sequence[np.ndarray], texts: Sequence[str], starts_s: Sequence[float]
    ) -> list[tuple[Word, ...]]:
        aligner = find_aligner()
        if aligner is None:
            return [()] * len(clips)
        waves = [resample(clip, rate_hz, aligner.sampling_rate) for clip in clips]
        found = word_times(waves, texts, aligner, offsets_s=starts_s)
        if problems := [own.problem for own in found if own.problem]:
            log.warning(
                "word times of %d of %d parts are estimates: %s",
                *(len(problems), len(found), problems[0]),
            )
        return [own.words for own in found]

    return to_words


def _confident(words: tuple[Word, ...], found: ClipText) -> tuple[Word, ...]:
    """Words with the confidences of their text; with none if these are not known."""
    known = found.confidences
    if known is None or len(words) != len(known):
        return tuple(replace(word, confidence=None) for word in words)
    pairs = zip(words, known, strict=True)
    return tuple(replace(word, confidence=confidence) for word, confidence in pairs)
