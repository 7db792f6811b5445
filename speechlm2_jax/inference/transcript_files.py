"""Writes a transcript as txt, json, jsonl, srt, vtt or tsv: pure functions from it to a text.

- srt, vtt: one cue for each segment (SubRip; W3C WebVTT, section 4).
- tsv: start, end and text of each segment, times in milliseconds, as Whisper's command writes.
- json, jsonl: text, duration, segments and words. A line of jsonl is a row of a manifest. Times are
  from the start of the recording, or of its stretch, whose `offset` is given.

A transcript without segments is one segment as long as its recording.
"""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from speechlm2_jax.inference.timed_text import Segment, Transcript, Word


def write_transcript(
    transcript: Transcript, form: str, audio: str | None = None, offset_s: float = 0.0
) -> str:
    """The contents of a file of the format `form`, a key of FORMATS, with a newline at its end.

    `audio` is the path or the address of the recording, and `offset_s` where the transcript begins
    in it; json and jsonl name both. Raises ValueError, with the formats there are, for another
    format.
    """
    writer = FORMATS.get(form)
    if writer is None:
        raise ValueError(f"format {form!r} is not supported; use one of {', '.join(FORMATS)}")
    return writer(transcript, audio, offset_s)


def to_dict(
    transcript: Transcript, audio: str | None = None, offset_s: float = 0.0
) -> dict[str, Any]:
    """The transcript as plain data, with the keys of a manifest; what is not known is left out.

    `offset_s` is where it begins in its recording; from there its times are.
    """
    return _known(
        audio_filepath=audio,
        offset=_rounded(offset_s) or None,
        duration=_rounded(transcript.duration_s),
        text=transcript.text,
        segments=[_segment(segment) for segment in transcript.segments] or None,
    )


def from_dict(row: Mapping[str, Any]) -> Transcript:
    """The transcript of a row that `to_dict` made. Raises KeyError for one without `text`."""
    segments = [
        Segment(
            text=own["text"],
            start=own["start"],
            end=own["end"],
            words=tuple(Word(**word) for word in own.get("words") or ()),
        )
        for own in row.get("segments") or ()
    ]
    return Transcript(row["text"], segments=segments, duration_s=row.get("duration"))


def time_stamp(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds and milliseconds, with `mark` before the last: 00:01:02.500."""
    total_ms = _milliseconds(seconds)
    minutes, rest_ms = divmod(total_ms, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest_ms // 1000:02}{mark}{rest_ms % 1000:03}"


def _txt(transcript: Transcript, _audio: str | None, _offset_s: float) -> str:
    return f"{transcript.text}\n"


def _json(transcript: Transcript, audio: str | None, offset_s: float) -> str:
    return json.dumps(to_dict(transcript, audio, offset_s), ensure_ascii=False, indent=2) + "\n"


def _jsonl(transcript: Transcript, audio: str | None, offset_s: float) -> str:
    return json.dumps(to_dict(transcript, audio, offset_s), ensure_ascii=False) + "\n"


def _srt(transcript: Transcript, _audio: str | None, _offset_s: float) -> str:
    return "".join(
        f"{number}\n{_span(segment, ',')}\n{_one_line(segment.text)}\n\n"
        for number, segment in enumerate(_cues(transcript), 1)
    )


def _vtt(transcript: Transcript, _audio: str | None, _offset_s: float) -> str:
    cues = (
        f"{_span(segment, '.')}\n{html.escape(_one_line(segment.text), quote=False)}\n\n"
        for segment in _cues(transcript)
    )
    return "WEBVTT\n\n" + "".join(cues)


def _tsv(transcript: Transcript, _audio: str | None, _offset_s: float) -> str:
    rows = (
        f"{_milliseconds(segment.start)}\t{_milliseconds(segment.end)}\t{_one_line(segment.text)}\n"
        for segment in _cues(transcript)
    )
    return "start\tend\ttext\n" + "".join(rows)


FORMATS: Mapping[str, Callable[[Transcript, str | None, float], str]] = {
    "txt": _txt,
    "json": _json,
    "jsonl": _jsonl,
    "srt": _srt,
    "vtt": _vtt,
    "tsv": _tsv,
}
"""Name of a format, which is also the suffix of its files -> its writer."""
TIMED_FORMATS = ("srt", "vtt", "tsv")
"""Formats that have nothing to show without times."""


def _cues(transcript: Transcript) -> Sequence[Segment]:
    """The segments with text; a transcript without segments is one."""
    if transcript.segments or not transcript.text:
        return [segment for segment in transcript.segments if segment.text.strip()]
    return [Segment(text=transcript.text, start=0.0, end=transcript.duration_s or 0.0)]


def _segment(segment: Segment) -> dict[str, Any]:
    words = [
        _known(
            text=word.text,
            start=_rounded(word.start),
            end=_rounded(word.end),
            confidence=None if word.confidence is None else round(word.confidence, 4),
            is_estimated=word.is_estimated or None,
        )
        for word in segment.words
    ]
    return _known(
        text=segment.text,
        start=_rounded(segment.start),
        end=_rounded(segment.end),
        words=words or None,
    )


def _span(segment: Segment, mark: str) -> str:
    return f"{time_stamp(segment.start, mark)} --> {time_stamp(segment.end, mark)}"


def _one_line(text: str) -> str:
    """Without line breaks, which would end a cue or a row, and without an arrow (`-->`)."""
    return " ".join(text.split()).replace("-->", "->")


def _milliseconds(seconds: float) -> int:
    return max(round(seconds * 1000), 0)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _known(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
