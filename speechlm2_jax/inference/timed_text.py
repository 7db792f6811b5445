"""Transcripts with times: `Word`, `Segment` and `Transcript`, what every `transcribe` returns.

Times are seconds from the start of the recording. Nothing here imports JAX.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

MAX_CUE_S = 7.0
"""Longest segment made of words, in seconds: the longest that a subtitle is usually shown."""
MAX_CUE_CHARACTERS = 84
"""Longest text of a segment made of words: two lines of subtitles."""
PAUSE_S = 0.8
"""A longer silence between two words ends a segment."""
SENTENCE_ENDS = (".", "?", "!", "…", "。", "？", "！")


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word as it is written, punctuation included."""

    text: str
    start: float
    """Seconds."""
    end: float
    """Seconds."""
    confidence: float | None = None
    """Probability from 0 to 1 that the word is right; None if it is not known."""
    is_estimated: bool = False
    """Whether its times are only estimates between those of its neighbours."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Some words in a row, such as a sentence or a line of subtitles."""

    text: str
    start: float
    """Seconds."""
    end: float
    """Seconds."""
    words: tuple[Word, ...] = ()
    """The words of `text`; empty if their times are not known."""


class Transcript(str):
    """The text of a recording, with its times.

    It is a str, equal to its text, so that code written for plain texts takes it.
    """

    segments: tuple[Segment, ...]
    """In order of time; empty if no times were asked for."""
    duration_s: float | None
    """Length of the recording in seconds; None if it is not known."""

    def __new__(
        cls,
        text: str = "",
        *,
        segments: Iterable[Segment] = (),
        duration_s: float | None = None,
    ) -> Self:
        """Makes a transcript of `text`, which the texts of `segments` repeat."""
        made = super().__new__(cls, text)
        made.segments, made.duration_s = tuple(segments), duration_s
        return made

    @property
    def text(self) -> str:
        """The text itself."""
        return str.__str__(self)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all segments; empty if their times are not known."""
        return tuple(word for segment in self.segments for word in segment.words)

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (self.text,), {"segments": self.segments, "duration_s": self.duration_s}


def segments_of(words: Sequence[Word]) -> tuple[Segment, ...]:
    """Groups words into segments that fit a subtitle.

    A segment ends after a sentence and before a pause of PAUSE_S. It is also ended before it would
    be longer than MAX_CUE_S or MAX_CUE_CHARACTERS.
    """
    groups: list[list[Word]] = []
    for word in words:
        if not groups or _ends_before(groups[-1], word):
            groups.append([])
        groups[-1].append(word)
    return tuple(
        Segment(text=_text(own), start=own[0].start, end=own[-1].end, words=tuple(own))
        for own in groups
    )


def _ends_before(group: Sequence[Word], word: Word) -> bool:
    last = group[-1]
    return (
        last.text.endswith(SENTENCE_ENDS)
        or word.start - last.end > PAUSE_S
        or word.end - group[0].start > MAX_CUE_S
        or len(_text([*group, word])) > MAX_CUE_CHARACTERS
    )


def _text(words: Iterable[Word]) -> str:
    return " ".join(word.text for word in words)
