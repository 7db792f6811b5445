"""Transcripts are texts with times, and each file format shows them in its own way."""

import json
import pickle
import subprocess
import sys

import pytest

from speechlm2_jax.inference.timed_text import (
    MAX_CUE_CHARACTERS,
    MAX_CUE_S,
    Segment,
    Transcript,
    Word,
    segments_of,
)
from speechlm2_jax.inference.transcript_files import (
    FORMATS,
    from_dict,
    time_stamp,
    to_dict,
    write_transcript,
)

HELLO = (
    Word(text="Hello", start=0.5, end=0.75, confidence=0.9),
    Word(text="<b>&", start=0.8, end=1.0),
)
LATER = (Word(text="late-->r", start=3661.0, end=3661.25, confidence=0.5),)


def transcript(**options):
    return Transcript("Hello <b>& late-->r", segments=segments_of(HELLO + LATER), **options)


def test_a_transcript_is_its_text():
    made = transcript(duration_s=3662.0)
    assert made == "Hello <b>& late-->r" == made.text and type(made.text) is str
    assert made.words == HELLO + LATER
    assert Transcript() == "" and Transcript().segments == Transcript().words == ()


def test_a_transcript_goes_to_another_process():
    made = transcript(duration_s=4.0)
    again = pickle.loads(pickle.dumps(made))
    assert again == made and again.segments == made.segments and again.duration_s == 4.0


def test_segments_end_at_pauses_sentences_and_the_longest_cue():
    words = [Word(text="a", start=n * 0.5, end=n * 0.5 + 0.4) for n in range(40)]
    cues = segments_of(words)
    assert max(cue.end - cue.start for cue in cues) <= MAX_CUE_S
    assert [w for cue in cues for w in cue.words] == words
    ended = Word(text="end.", start=0.0, end=0.1), Word(text="next", start=0.2, end=0.3)
    assert [cue.text for cue in segments_of(ended)] == ["end.", "next"]
    assert [cue.text for cue in segments_of(HELLO + LATER)] == ["Hello <b>&", "late-->r"]
    assert segments_of([]) == ()


def test_text_without_spaces_is_cut_into_cues():
    text = (
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002"
        + "\u6211\u4eec\u53bb\u516c\u56ed\uff0c" * 8
        + "\u597d\u5427\u3002"
    )
    whole = Word(text=text, start=10.0, end=50.0, confidence=0.5)
    cues = segments_of([*HELLO, whole, Word(text="end", start=50.0, end=50.5)])
    assert [cues[0].text, cues[-1].text] == ["Hello <b>&", "end"]
    parts = cues[1:-1]
    assert "".join(cue.text for cue in parts) == text and len(parts) > 5
    assert all(cue.end - cue.start <= MAX_CUE_S + 1e-6 for cue in parts)
    assert all(cue.text[-1] in "\u3002\uff0c" for cue in parts)
    assert [parts[0].start, parts[-1].end] == [10.0, pytest.approx(50.0)]
    assert all(a.end == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert all(word.is_estimated for cue in parts for word in cue.words)
    (short,) = segments_of([Word(text=text[:7], start=0.0, end=2.0)])
    assert short.text == text[:7] and not short.words[0].is_estimated


@pytest.mark.parametrize("text", ["a" * 100, "." * 400, "\u0e01\u0e33" * 100, "\u4f60" * 90])
def test_no_cue_has_too_many_characters(text):
    cues = segments_of([Word(text=text, start=0.0, end=0.0)])
    assert "".join(cue.text for cue in cues) == text
    assert max(len(cue.text) for cue in cues) <= MAX_CUE_CHARACTERS
    assert len(cues) == -(-len(text) // MAX_CUE_CHARACTERS)


def test_a_slow_word_is_one_word():
    (cue,) = segments_of([Word(text="slow", start=0.0, end=9.0)])
    assert cue.words[0] == Word(text="slow", start=0.0, end=9.0)


def test_json_tells_estimates_and_the_offset():
    estimated = Word(text="42", start=0.0, end=0.5, is_estimated=True)
    made = Transcript("42", segments=segments_of([estimated]), duration_s=1.0)
    for form in ("json", "jsonl"):
        row = json.loads(write_transcript(made, form, "a.wav", 12.5))
        assert row["offset"] == 12.5 and row["segments"][0]["words"][0]["is_estimated"] is True
        assert from_dict(row).words == (estimated,)
    assert "offset" not in to_dict(made, "a.wav")


def test_subtitles():
    assert write_transcript(transcript(), "srt") == (
        "1\n00:00:00,500 --> 00:00:01,000\nHello <b>&\n\n"
        "2\n01:01:01,000 --> 01:01:01,250\nlate->r\n\n"
    )
    assert write_transcript(transcript(), "vtt") == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.000\nHello &lt;b&gt;&amp;\n\n"
        "01:01:01.000 --> 01:01:01.250\nlate-&gt;r\n\n"
    )


def test_tables_and_texts():
    assert write_transcript(transcript(), "tsv") == (
        "start\tend\ttext\n500\t1000\tHello <b>&\n3661000\t3661250\tlate->r\n"
    )
    assert write_transcript(transcript(), "txt") == "Hello <b>& late-->r\n"


def test_json_keeps_everything():
    made = transcript(duration_s=3662.0)
    whole = json.loads(write_transcript(made, "json", "a.wav"))
    line = write_transcript(made, "jsonl", "a.wav")
    assert whole == json.loads(line) == to_dict(made, "a.wav") and line.count("\n") == 1
    assert whole["audio_filepath"] == "a.wav" and whole["duration"] == 3662.0
    again = from_dict(whole)
    assert again == made and again.segments == made.segments and again.duration_s == 3662.0
    assert "confidence" not in whole["segments"][0]["words"][1]


def test_a_transcript_without_times_is_one_cue():
    plain = Transcript("one\ntwo", duration_s=2.0)
    assert write_transcript(plain, "srt") == "1\n00:00:00,000 --> 00:00:02,000\none two\n\n"
    assert json.loads(write_transcript(plain, "json")) == {"duration": 2.0, "text": "one\ntwo"}
    silence = Transcript("", segments=[Segment(text=" ", start=0, end=1)])
    assert write_transcript(silence, "srt") == write_transcript(Transcript(), "srt") == ""


def test_rounding_carries_into_minutes():
    assert time_stamp(59.9996, ".") == "00:01:00.000"
    assert time_stamp(-0.01, ",") == "00:00:00,000"


def test_another_format_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=f"'doc' is not supported; use one of {', '.join(FORMATS)}"
    ):
        write_transcript(transcript(), "doc")


def test_writing_needs_no_jax():
    code = (
        "import sys, speechlm2_jax.inference.transcript_files;"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
