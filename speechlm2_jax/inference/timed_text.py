"""Transcripts with times: `Word`, `Segment` and `Transcript`, what every `transcribe` returns.

Times are seconds from the start of the recording. Nothing here imports JAX.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

MAX_CUE_S = 7.0
"""Longest segment made of words, in seconds: the longest that a subtitle is usually shown."""
MAX_CUE_CHARACTERS = 84
"""Longest text of a segment made of words: two lines of subtitles."""
PAUSE_S = 0.8
"""A longer silence between two words ends a segment."""
SENTENCE_ENDS = (".", "?", "!", "…", "。", "？", "！")
LONGEST_MARKS = 4
"""Marks in a row that are kept with the letter before them, where a text is cut."""
_SENTENCE_END = re.compile("[?!…。？！]+")
_CLAUSE_END = re.compile("[,;:，、；：]+")
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese."""


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
    be longer than MAX_CUE_S or MAX_CUE_CHARACTERS. A word that is longer alone, as in scripts
    without spaces, becomes several segments: each character is given the same time.
    """
    groups: list[list[Word]] = []
    is_open = False
    for word in words:
        if _is_too_long(word):
            groups += [[part] for part in _split(word)]
            is_open = False
            continue
        if not is_open or _ends_before(groups[-1], word):
            groups.append([])
        groups[-1].append(word)
        is_open = True
    return tuple(
        Segment(text=_text(own), start=own[0].start, end=own[-1].end, words=tuple(own))
        for own in groups
    )


def _is_too_long(word: Word) -> bool:
    """Whether a word is no single word, or too long for a segment."""
    if len(word.text) > MAX_CUE_CHARACTERS:
        return True
    return word.end - word.start > MAX_CUE_S and len(_WITHOUT_SPACES.findall(word.text)) > 1


def _split(word: Word) -> Iterator[Word]:
    """Cuts a word into words that fit a segment, with the times of their characters."""
    text, step_s = word.text, (word.end - word.start) / len(word.text)
    most = MAX_CUE_CHARACTERS if step_s <= 0 else int(min(MAX_CUE_CHARACTERS, MAX_CUE_S / step_s))
    start = 0
    while start < len(text):
        end = _end_of_part(text, start, max(most, 1))
        times = (word.start + n * step_s for n in (start, end))
        yield replace(
            word, text=text[start:end], start=next(times), end=next(times), is_estimated=True
        )
        start = end


def _end_of_part(text: str, start: int, most: int) -> int:
    """Where the part of a text ends that begins at `start`: after a sentence, else a clause."""
    end = start + most
    if (found := _SENTENCE_END.search(text, start, end)) is not None:
        return found.end()
    if end >= len(text):
        return len(text)
    if clauses := list(_CLAUSE_END.finditer(text, start, end)):
        return clauses[-1].end()
    near = range(end, max(end - LONGEST_MARKS, start), -1)  # marks stay with the letter before them
    return next((n for n in near if unicodedata.category(text[n])[0] not in "MP"), end)


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
