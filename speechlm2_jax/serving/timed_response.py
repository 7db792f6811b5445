"""A transcription with its times, and how OpenAI's verbose_json tells them."""

import bisect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from speechlm2_jax.inference.long_form.pauses import Stretch
from speechlm2_jax.inference.recordings_to_text import part_segments
from speechlm2_jax.inference.timed_text import Segment, Transcript, Word
from speechlm2_jax.inference.timestamps.confidence import ToText, token_spans, word_spans
from speechlm2_jax.serving.pieces import text_of_part
from speechlm2_jax.serving.rows import Outcome


@dataclass
class TimedResponse:
    """The outcome of a transcription, with the parts of its recording."""

    outcome: Outcome
    wave: Float32[np.ndarray, " S"]
    parts: Sequence[Stretch]
    rate_hz: int
    words: Sequence[tuple[Word, ...]] = field(default_factory=list)
    """The words of each part; empty if their times are not known."""

    @property
    def texts(self) -> list[str]:
        """The text of each part."""
        return [text_of_part(part.text) for part in self.outcome.parts]

    @property
    def segments(self) -> list[tuple[Segment, ...]]:
        """The segments of each part."""
        words = self.words or [()] * len(self.parts)
        own = zip(self.parts, self.texts, words, strict=True)
        return [part_segments(*one, self.rate_hz) for one in own]

    @property
    def transcript(self) -> Transcript:
        """The transcript that `transcribe` gives for the recording."""
        segments = [segment for own in self.segments for segment in own]
        duration_s = len(self.wave) / self.rate_hz
        return Transcript(self.outcome.text, segments=segments, duration_s=duration_s)


def words_json(timed: TimedResponse) -> list[dict[str, Any]]:
    """The words, with times in seconds."""
    return [
        {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
        for word in timed.transcript.words
    ]


def segments_json(
    timed: TimedResponse, temperature: float, to_text: ToText
) -> list[dict[str, Any]]:
    """The segments, each with its tokens and their mean log-probability."""
    found: list[dict[str, Any]] = []
    for part, segments in zip(timed.outcome.parts, timed.segments, strict=True):
        counts = [len(segment.text.split()) for segment in segments]
        slices = split_tokens(part.ids, counts, to_text)
        for segment, own in zip(segments, slices, strict=True):
            raw = segment.text.encode()
            logprobs = part.logprobs[own] if own.stop > own.start else part.logprobs
            found.append(
                {
                    "id": len(found),
                    "seek": 0,
                    "start": round(segment.start, 3),
                    "end": round(segment.end, 3),
                    "text": segment.text,
                    "tokens": part.ids[own].tolist(),
                    "temperature": temperature,
                    "avg_logprob": float(logprobs.mean()) if len(logprobs) else 0.0,
                    "compression_ratio": len(raw) / max(len(zlib.compress(raw)), 1),
                }
            )
    return found


def split_tokens(ids: np.ndarray, counts: Sequence[int], to_text: ToText) -> list[slice]:
    """The tokens of groups of words that follow one another, of `counts` words.

    If the words of `ids` are others (a loop that is written once), the first group has all tokens.
    """
    if len(counts) < 2:
        return [slice(0, len(ids))] * len(counts)
    words = word_spans(to_text(ids.tolist()))
    bounds = [len(ids)] * (len(counts) - 1)
    if len(words) == sum(counts):
        ends = [end for _, end in token_spans(ids.tolist(), to_text)]
        firsts = np.cumsum(counts[:-1]).tolist()
        bounds = [bisect.bisect_right(ends, words[first][0]) for first in firsts]
    return [slice(*own) for own in zip([0, *bounds], [*bounds, len(ids)], strict=True)]
