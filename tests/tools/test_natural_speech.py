"""Texts, voices and codecs of the encoder's natural training speech."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools" / "corpus"))
import make_natural_speech
import natural_voices
import open_texts


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("He wanted it painted, but couldn't spare the time!", None),
        ("the year 1812 was cold", ""),
        ("as in e.g. this one", ""),
        ("the NATO countries agreed", ""),
        ("two words", ""),
        ("mrs dashwood came in", ""),
        ("a well-known fact - of course", "a well known fact of course"),
    ],
)
def test_plain_words_keep_plain_english_alone(phrase, words):
    expected = "he wanted it painted but couldn't spare the time" if words is None else words
    assert open_texts.plain_words(phrase) == expected


def test_shuffled_gives_each_text_once_before_any_again():
    texts = [str(n) for n in range(7)]
    stream = open_texts.shuffled(texts, np.random.default_rng(0))
    first, second = ([next(stream) for _ in texts] for _ in range(2))
    assert sorted(first) == sorted(second) == texts and first != second


@pytest.fixture
def plan(monkeypatch):
    texts = [f"the text number {word} of many" for word in "one two three four five".split()]
    monkeypatch.setattr(open_texts, "dictionary_texts", lambda: texts)
    monkeypatch.setattr(open_texts, "novel_texts", lambda: texts)
    return make_natural_speech.plan_utterances(2000)


def test_a_plan_is_the_same_each_time_and_has_all_voices_by_their_shares(plan):
    assert plan == make_natural_speech.plan_utterances(2000)
    labels = [one.voice_label for one in plan]
    natural = [label for label in labels if "_" in label and not label.startswith("en-")]
    assert len(natural) / len(plan) == pytest.approx(1 - make_natural_speech.ESPEAK_SHARE, abs=0.04)
    total = sum(voice.share for voice in natural_voices.VOICES)
    for voice in natural_voices.VOICES:
        share = natural.count(voice.label) / len(natural)
        assert share == pytest.approx(voice.share / total, rel=0.5)


@pytest.mark.parametrize("codec", make_natural_speech.FORMATS)
def test_a_codec_keeps_length_and_most_of_a_tone(codec):
    wave = 0.3 * np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    back = make_natural_speech.through_codec(wave, codec)
    assert back.shape == wave.shape and not np.array_equal(back, wave)
    spectra = [np.abs(np.fft.rfft(x * np.hanning(len(x)))) for x in (wave, back)]
    assert np.argmax(spectra[0]) == np.argmax(spectra[1])


def test_a_missing_engine_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    voice = next(voice for voice in natural_voices.VOICES if voice.engine == "flite")
    with pytest.raises(RuntimeError, match="flite is missing"):
        natural_voices.synthesize("hello there", voice)


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_a_larger_speaker_is_lower_and_as_long():
    voice = next(voice for voice in natural_voices.VOICES if voice.label == "flite_slt")
    plain, large = (
        natural_voices.synthesize("the house on the hill is old", voice, size=size)
        for size in (1, 1.2)
    )
    assert len(large) == pytest.approx(len(plain), rel=0.05)
    centres = [
        np.average(np.arange(len(s)) / len(s), weights=s)
        for s in (np.abs(np.fft.rfft(wave)) for wave in (plain, large))
    ]
    assert centres[1] < centres[0]
