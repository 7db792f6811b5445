"""Confidence of words: products of their tokens' probabilities."""

import math
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference.timestamps.confidence import word_confidences

ROOT = Path(__file__).parents[2]
PIECES = ["Hel", "lo", ",", " wor", "ld", "!", " -", " ", "caf", "\u00e9"]


def to_text(ids):
    return "".join(PIECES[i] for i in ids)


def confidences(ids, probabilities):
    return word_confidences(ids, np.log(probabilities), to_text)


def test_letters_of_a_word_count_and_punctuation_does_not():
    found = confidences([0, 1, 2, 3, 4, 5], [0.5, 0.8, 0.1, 0.9, 0.5, 0.2])
    assert found == pytest.approx([0.4, 0.45])


def test_a_mark_alone_is_certain_and_an_empty_text_has_no_words():
    assert confidences([0, 1, 6, 3, 4], [0.5, 1, 0.1, 1, 1]) == pytest.approx([0.5, 1.0, 1.0])
    assert confidences([], []) == [] and confidences([7], [0.3]) == []


def test_bytes_of_one_character_count_for_its_word():
    parts = ["caf", "\u00c3", "\u00a9", " x"]

    def decode(ids):
        done = "".join(parts[i] for i in ids).encode("latin-1")
        return done.decode("utf-8", errors="replace")

    found = word_confidences([0, 1, 2, 3], np.log([0.5, 0.5, 0.5, 0.25]), decode)
    assert found == pytest.approx([0.125, 0.25])


def test_words_of_the_bundled_llm_have_a_confidence_each():
    tokenizer = Tokenizer(ROOT / "configs" / "parts" / "tiny_llm")
    text = "turn off the heater in the bathroom please"
    ids = tokenizer.text_to_ids(text)
    logprobs = np.full(len(ids), math.log(0.9))
    found = word_confidences(ids, logprobs, tokenizer.ids_to_text)
    assert len(found) == len(text.split())
    assert math.prod(found) == pytest.approx(0.9 ** len(ids), rel=1e-6)
