"""Word timestamps of texts: recordings and final texts in, words with times out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.inference.timed_text import Word
from speechlm2_jax.inference.timestamps.aligner import AlignedLabels, Aligner
from speechlm2_jax.inference.timestamps.bounds import Timing, word_spans
from speechlm2_jax.inference.timestamps.speech import find_silences


@dataclass(frozen=True, kw_only=True)
class AlignedText:
    """The words of one text in time."""

    words: tuple[Word, ...]
    """The text's words, split at white space; `is_estimated` marks those without frames.

    Their confidence is that of a CTC aligner: the product of the probabilities of their labels.
    """
    score: float | None
    """Mean log-probability per frame, in nats: near 0 if the recording has this text.

    None if the text does not fit, and from a transducer.
    """
    problem: str | None = None
    """Why the text does not fit the recording: then the times of all words are estimates."""


def word_times(
    waves: Sequence[np.ndarray],
    texts: Sequence[str],
    aligner: Aligner,
    *,
    offsets_s: Sequence[float] | None = None,
    timing: Timing | None = None,
) -> list[AlignedText]:
    """Finds start and end of each word of final texts: with case, punctuation and digits.

    `waves` are float32 [S] at the aligner's rate, each short enough for its encoder: cut a long
    recording, and give each cut's start in `offsets_s`, which is added to its times. A word of
    which the aligner knows no character gets the time between its neighbours and is marked
    `is_estimated`. So are all words of a text that does not fit into its recording (`problem`).
    `timing` is the aligner's own by default.
    Raises ValueError for unequal numbers of recordings, texts and offsets.
    """
    offsets = [0.0] * len(waves) if offsets_s is None else list(offsets_s)
    if not len(waves) == len(texts) == len(offsets):
        raise ValueError(
            f"{len(waves)} recordings, {len(texts)} texts and {len(offsets)} offsets; give as many "
            "of each"
        )
    words = [text.split() for text in texts]
    rows = [n for n, own in enumerate(words) if own and len(waves[n])]
    aligned = aligner.align([waves[n] for n in rows], [words[n] for n in rows])
    found = dict(zip(rows, aligned, strict=True))
    return [
        _in_time(waves[n], words[n], found[n], offsets[n], aligner, timing or aligner.timing)
        if n in found
        else _without_sound(words[n], offsets[n])
        for n in range(len(waves))
    ]


def _in_time(
    wave: np.ndarray,
    words: Sequence[str],
    aligned: AlignedLabels,
    offset_s: float,
    aligner: Aligner,
    timing: Timing,
) -> AlignedText:
    silences = find_silences(wave, aligner.sampling_rate)
    spans = word_spans(aligned.labels, silences, frame_s=aligner.frame_s, timing=timing)
    has_frames = {label.word for label in aligned.labels if label.emitted is not None}
    confidences = _confidences(aligned)
    timed = [
        Word(
            text=word,
            start=round(offset_s + span.start, 3),
            end=round(offset_s + span.end, 3),
            confidence=confidences.get(n),
            is_estimated=n not in has_frames,
        )
        for n, (word, span) in enumerate(zip(words, spans, strict=True))
    ]
    return AlignedText(words=tuple(timed), score=aligned.score, problem=aligned.problem)


def _confidences(aligned: AlignedLabels) -> dict[int, float]:
    """The product of the probabilities of each word's labels, where all of these are known."""
    log_probs: dict[int, list[float | None]] = {}
    for label, own in zip(aligned.labels, aligned.log_probs, strict=True):
        log_probs.setdefault(label.word, []).append(own)
    known = {word: [x for x in own if x is not None] for word, own in log_probs.items()}
    return {
        word: math.exp(sum(own)) for word, own in known.items() if len(own) == len(log_probs[word])
    }


def _without_sound(words: Sequence[str], offset_s: float) -> AlignedText:
    """A text of no words, or of words in a recording of no samples."""
    timed = [Word(text=w, start=offset_s, end=offset_s, is_estimated=True) for w in words]
    problem = "the recording has no samples" if words else None
    return AlignedText(words=tuple(timed), score=None, problem=problem)
