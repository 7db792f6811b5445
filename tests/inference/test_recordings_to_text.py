"""Recordings of any length become texts with times, by a model of short clips."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.inference.recordings_to_text import (
    ClipFunctions,
    ClipText,
    check_timestamps,
    transcribe_recordings,
)
from speechlm2_jax.inference.timed_text import Segment, Word

ROOT = Path(__file__).parents[2]
RATE_HZ = 16_000


def tone(seconds: float) -> np.ndarray:
    return (0.3 * np.sin(np.arange(int(seconds * RATE_HZ)) / 12)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE_HZ), np.float32)


def lengths(clips):
    """The text of a clip is its length in tenths of a second."""
    return [ClipText(f" {10 * len(clip) // RATE_HZ} t", (0.5, 0.25)) for clip in clips]


def words(clips, texts, starts_s):
    return [
        tuple(Word(text=word, start=start, end=start + 0.1) for word in text.split())
        for text, start in zip(texts, starts_s, strict=True)
    ]


LONG = np.concatenate([silence(1), tone(4), silence(1.5), tone(3), silence(9), tone(2)])


def test_a_long_recording_is_joined_from_its_parts():
    functions = ClipFunctions(rate_hz=RATE_HZ, to_texts=lengths)
    long, short, empty = transcribe_recordings(
        [LONG, tone(1), silence(0)], functions, timestamps="segment", max_audio_s=5.0
    )
    assert long == "42 t 32 t 21 t" and short == "10 t" and empty == ""
    starts = [segment.start for segment in long.segments]
    assert starts == pytest.approx([0.9, 6.4, 18.4], abs=0.05)
    assert [segment.text for segment in long.segments] == ["42 t", "32 t", "21 t"]
    assert short.segments == (Segment(text="10 t", start=0.0, end=1.0),)
    assert long.duration_s == 20.5 and empty.segments == ()


def test_words_have_times_in_the_recording_and_confidences():
    functions = ClipFunctions(
        rate_hz=RATE_HZ, to_texts=lengths, to_words=words, has_confidences=True
    )
    (long,) = transcribe_recordings([LONG], functions, timestamps="word", max_audio_s=5.0)
    assert [word.text for word in long.words] == long.split()
    assert long.words[2].start == pytest.approx(6.4, abs=0.05)
    assert [word.confidence for word in long.words] == [0.5, 0.25] * 3
    (whole,) = transcribe_recordings([LONG], functions, timestamps="segment", max_audio_s=5.0)
    assert whole.words == () and len(whole.segments) == len(long.segments) > 0
    assert [(s.text, s.start) for s in whole.segments] == [(s.text, s.start) for s in long.segments]
    (plain,) = transcribe_recordings([LONG], functions, timestamps=None, max_audio_s=5.0)
    assert plain == long and plain.segments == plain.words == ()


def test_silence_is_not_given_to_the_model():
    given = []

    def note(clips):
        given.extend(len(clip) / RATE_HZ for clip in clips)
        return lengths(clips)

    functions = ClipFunctions(rate_hz=RATE_HZ, to_texts=note)
    options = {"timestamps": None, "max_audio_s": 5.0}
    assert transcribe_recordings([silence(3)], functions, **options) == [""] and not given
    transcribe_recordings([LONG], functions, **options)
    assert sum(given) < 9 + 1  # silence at edges, and within parts
    (text,) = transcribe_recordings([silence(3)], functions, has_guards=False, **options)
    assert text.strip() == "30 t"  # and as the model wrote it


def test_a_loop_is_generated_again_and_then_written_once(caplog):
    def loops(clips):
        return [ClipText("go on " * 20 + "now") for _ in clips]

    options = {"timestamps": None, "max_audio_s": 5.0}
    mended = ClipFunctions(rate_hz=RATE_HZ, to_texts=loops, to_texts_again=lengths)
    assert transcribe_recordings([tone(2)], mended, **options) == ["20 t"]
    assert "repeated itself over 1 of 1 parts" in caplog.text
    assert "written once" not in caplog.text
    still = ClipFunctions(rate_hz=RATE_HZ, to_texts=loops, to_texts_again=loops)
    assert transcribe_recordings([tone(2)], still, **options) == ["go on now"]
    assert "in 1 it did again, and repetitions are written once" in caplog.text


def test_a_model_without_loops_keeps_equal_words(caplog):
    functions = ClipFunctions(rate_hz=RATE_HZ, to_texts=lambda clips: [ClipText("5 " * 8)])
    (text,) = transcribe_recordings([tone(2)], functions, timestamps=None, max_audio_s=5.0)
    assert text == "5 5 5 5 5 5 5 5" and not caplog.records


@pytest.mark.parametrize(
    ("text", "again", "confidences"),
    [("two words", None, None), ("go on " * 20, "go on " * 20, (0.5,) * 40)],
)
def test_words_of_an_llm_never_have_the_confidence_of_the_aligner(text, again, confidences):
    def aligned(clips, texts, starts_s):
        return [tuple(replace(w, confidence=0.9) for w in own) for own in words(clips, texts, [0])]

    functions = ClipFunctions(
        rate_hz=RATE_HZ,
        to_texts=lambda clips: [ClipText(text, confidences)],
        to_texts_again=lambda clips: [ClipText(again, confidences)],
        to_words=aligned,
        has_confidences=True,
    )
    options = {"timestamps": "word", "max_audio_s": 5.0}
    (found,) = transcribe_recordings([tone(2)], functions, **options)
    assert len(found.words) == 2 and {word.confidence for word in found.words} == {None}
    (found,) = transcribe_recordings(
        [tone(2)], replace(functions, has_confidences=False), **options
    )
    assert {word.confidence for word in found.words} == {0.9}, "of a model without its own"


def test_timestamps_are_none_segment_or_word():
    assert [check_timestamps(v) for v in (None, False, True, "segment")] == [
        *(None, None, "word", "segment")
    ]
    with pytest.raises(ValueError, match="timestamps='char' must be None, 'segment' or 'word'"):
        check_timestamps("char")


def test_a_model_gives_words_with_times():
    from speechlm2_jax.models import CTCModel

    model = CTCModel.from_pretrained(ROOT / "configs" / "parts" / "tiny_encoder.nemo")
    wave, _ = soundfile.read(ROOT / "corpus/audio/test/0000.ogg", dtype="float32")
    two = np.concatenate([wave, silence(1.5), wave])
    (alone,) = model.transcribe([wave], timestamps="word")
    (joined,) = model.transcribe([two], timestamps="word", max_audio_s=4.0)
    assert joined == f"{alone} {alone}" and len(alone.words) == len(alone.split()) > 5
    later = [word.start - len(wave) / RATE_HZ - 1.5 for word in joined.words[len(alone.words) :]]
    assert later == pytest.approx([word.start for word in alone.words], abs=0.1)
    assert all(word.start < word.end for word in joined.words)


@pytest.mark.slow
@pytest.mark.parametrize("pause_s", [0.5])
def test_joined_recordings_are_transcribed_as_each_alone(pause_s):
    """Within two points of WER; `pause_s` of silence between the recordings."""
    from speechlm2_jax.evaluation.metrics.wer import word_errors
    from speechlm2_jax.models import CTCModel

    corpus = ROOT / "corpus"
    rows = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()][:120]
    waves = [soundfile.read(corpus / r["audio_filepath"], dtype="float32")[0] for r in rows]
    model = CTCModel.from_pretrained(ROOT / "configs" / "parts" / "tiny_encoder.nemo")
    reference = [" ".join(row["text"] for row in rows)]
    apart = word_errors(reference, [" ".join(model.transcribe(waves))])
    whole = np.concatenate([part for wave in waves for part in (wave, silence(pause_s))])
    joined = word_errors(reference, list(model.transcribe([whole], max_audio_s=5.0)))
    print(f"WER apart {apart.wer:.4f}, joined {joined.wer:.4f}")
    assert joined.wer < apart.wer + 0.02
