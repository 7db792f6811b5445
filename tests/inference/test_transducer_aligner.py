"""Word times of transducers: the letters of their own transcript joined to those of the text."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.inference.timestamps.transducer_aligner import TransducerAligner, joined
from speechlm2_jax.inference.timestamps.word_times import word_times
from speechlm2_jax.models import ASRModel
from speechlm2_jax.pretrained.label_encoder import LabelEncoder

ASR = Path(__file__).parents[1] / "data" / "asr"


def spans(count, length_s=0.1):
    starts = np.arange(count) * length_s
    return np.stack([starts, starts + length_s], axis=1)


def words_of(aligned):
    """Word -> the spans of its labels."""
    found = {}
    for label in aligned.labels:
        found.setdefault(label.word, []).append(label.emitted)
    return found


def test_letters_are_joined_whatever_case_marks_and_spaces():
    aligned = joined(["Well-known,", "caf\u00e9s!"], ["well", "known", "ca", "fes"], spans(4))
    (a, b), (c, d) = words_of(aligned).values()
    assert [a[0], b[1], c[0], d[1]] == pytest.approx([0.0, 0.2, 0.2, 0.4])
    assert [label.letters for label in aligned.labels] == [4, 5, 2, 3]


def test_a_replaced_word_keeps_its_time_and_a_missing_one_has_none():
    aligned = joined(["the", "red", "hat", "42"], ["the", "bed", "hat"], spans(3))
    found = words_of(aligned)
    assert found[1] == [pytest.approx((0.1, 0.2))] and found[3] == [None]
    assert aligned.problem is None
    # a word that the text lacks takes no time from its neighbours
    found = words_of(joined(["the", "hat"], ["the", "old", "hat"], spans(3)))
    assert found == {0: [pytest.approx((0, 0.1))], 1: [pytest.approx((0.2, 0.3))]}


def test_only_words_that_are_spelt_alike_have_the_probability_of_the_label():
    log_probs = [-0.1, -0.2, -0.3]
    aligned = joined(["the", "red", "hats"], ["the", "bed", "hats"], spans(3), log_probs)
    assert aligned.log_probs == (-0.1, None, -0.3)


def test_a_word_of_more_or_fewer_letters_is_not_spelt_alike():
    def known(words, labels, numbers=None):
        return joined(words, labels, spans(len(labels)), [-0.1] * len(labels), numbers).log_probs

    assert known(["not", "now"], ["no", "now"]) == (None, -0.1)
    assert known(["no", "now"], ["not", "now"]) == (None, -0.1)
    # pieces of words: "no" + "t" is another word than "no", and "the hat" has its own words
    assert known(["no", "now"], ["no", "t", "now"], [0, 0, 1]) == (None, -0.1)
    assert known(["the", "hat"], ["the", "old", "hat"]) == (-0.1, -0.1)
    assert known(["well-known"], ["well", "known"], [1, 2]) == (-0.1, -0.1)


def test_labels_belong_to_words_of_the_transcript():
    pieces = LabelEncoder(["\u2581no", "t", "\u2581", "n"], lambda words: [[] for _ in words])
    assert pieces.word_numbers([0, 1, 2, 3, 0]) == [1, 1, 2, 2, 3]
    characters = LabelEncoder.from_characters([" ", "a", "b"])
    assert characters.word_numbers([1, 2, 0, 1]) == [0, 0, 1, 1]
    word_pieces = LabelEncoder.from_word_pieces(["no", "##t"])
    assert word_pieces.word_numbers([0, 1, 0]) == [1, 1, 2]


def test_another_text_is_told():
    aligned = joined(["completely", "different"], ["xyz", "uvw"], spans(2))
    assert aligned.problem == "the ASR model's own transcript of it is another text"
    assert words_of(aligned) == {0: [None], 1: [None]}


@pytest.fixture(scope="module")
def aligner():
    return ASRModel.from_pretrained(ASR / "tdt.nemo").aligner()


def test_frames_are_those_of_the_transcript(aligner):
    given = load_file(ASR / "tdt_golden.safetensors")
    wave = np.split(given["audio"], np.cumsum(given["audio_len"])[:-1])[0].astype(np.float32)
    assert isinstance(aligner, TransducerAligner)
    hypotheses = aligner._hypotheses([wave])
    labels = np.asarray(hypotheses.labels[0, : hypotheses.lengths[0]]).tolist()
    letters = aligner.encoder.letters(labels)
    text = "".join(letters)  # as one word
    (aligned,) = aligner.align([wave], [[text]])
    first = (np.asarray(hypotheses.frames[0]) - 3) * aligner.frame_s
    with_letters = [n for n, own in enumerate(letters) if own]
    assert [x.emitted[0] for x in aligned.labels] == pytest.approx(first[with_letters].tolist())
    log_probs = np.asarray(hypotheses.log_probs[0])
    assert list(aligned.log_probs) == pytest.approx(log_probs[with_letters].tolist())
    (found,) = word_times([wave], [f"{text.title()}, 1984"], aligner)
    assert found.words[0].confidence == pytest.approx(np.exp(log_probs[with_letters].sum()))
    assert found.words[1].confidence is None
    assert [w.is_estimated for w in found.words] == [False, True] and found.score is None
    assert 0 <= found.words[0].start < found.words[0].end <= found.words[1].end <= len(wave) / 16000
