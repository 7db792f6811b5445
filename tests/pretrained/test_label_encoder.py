"""Words with case, punctuation, accents and digits -> labels of ASR models."""

from pathlib import Path

import pytest

from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.pretrained.label_encoder import LabelEncoder, nemo_label_encoder
from speechlm2_jax.pretrained.locate import nemo_tokenizer

ROOT = Path(__file__).parents[2]
CHARACTERS = LabelEncoder.from_characters([" ", *"abcdefghijklmnopqrstuvwxyz'"])
PIECES = LabelEncoder.from_word_pieces(
    ["[UNK]", "hello", "##ing", "walk", "h", "##e", "W", "##!", "'"]
)


def text(labels):
    """The characters that labels of CHARACTERS stand for."""
    return "".join(" abcdefghijklmnopqrstuvwxyz'"[i] for i in labels)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Hello,", "hello"),
        ("don\u2019t", "don't"),
        ("well-known", "well known"),
        ("Caf\u00e9", "cafe"),
        ("\ufb01ne", "fine"),
        ("B2B", "bb"),
        ("1984", ""),
        ("\u2014", ""),
    ],
)
def test_words_become_what_the_model_knows(word, expected):
    (found,) = CHARACTERS([word])
    assert text(found.labels) == expected
    assert found.letters == tuple(int(c.isalpha()) for c in expected)


def test_a_digit_has_the_length_of_its_name():
    assert [found.length for found in CHARACTERS(["1984", "a1", "-"])] == [16, 5, 0]


def test_case_is_kept_where_the_model_has_it():
    assert PIECES(["Walking", "W"])[1].labels == (6,)


def test_word_pieces_are_the_longest_that_fit():
    assert PIECES(["walking", "he", "hello!"]) == [
        ((3, 2), (4, 3), 7),
        ((4, 5), (1, 1), 2),
        ((1,), (5,), 5),
    ]


def test_every_word_of_the_corpus_has_the_labels_of_its_text():
    archive = read_nemo(ROOT / "configs" / "parts" / "tiny_encoder.nemo")
    encoder = nemo_label_encoder(archive, "ctc")
    words = "turn off the heater in the bathroom please".split()
    expected = nemo_tokenizer(archive).text_to_ids(" ".join(words))
    found = encoder(words)
    assert [i for word in found for i in word.labels] == expected
    assert [sum(word.letters) for word in found] == [len(word) for word in words]
    assert encoder(["Turn", "OFF!"]) == found[:1] + [found[1]]
