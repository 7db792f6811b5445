"""Scores per data set: what was added, in whatever parts, is scored once."""

import logging
import math

import pytest

from speechlm2_jax.evaluation.metrics.bleu import BLEU, EmptyTextRate
from speechlm2_jax.evaluation.metrics.error_rates import CER, WER

REFERENCES = ["the cat sat on the mat", "a dog ran home", "yes it is so"]
HYPOTHESES = ["the cat sat on a mat", "a dog ran", "yes it is so"]


@pytest.mark.parametrize("make", [BLEU, WER, CER, EmptyTextRate])
def test_parts_and_merged_processes_score_as_the_whole(make):
    whole, parts, other = make(), make(), make()
    whole.update("a", REFERENCES, HYPOTHESES)
    whole.update("b", REFERENCES[:1], HYPOTHESES[:1])
    parts.update("a", REFERENCES[:1], HYPOTHESES[:1])
    other.update("a", REFERENCES[1:], HYPOTHESES[1:])
    other.update("b", REFERENCES[:1], HYPOTHESES[:1])
    parts.merge(other)
    found = whole.compute()
    assert parts.compute() == found == whole.compute()
    key = whole.key
    assert list(found) == [f"{key}_a", f"{key}_b", key]
    assert found[key] == pytest.approx((found[f"{key}_a"] + found[f"{key}_b"]) / 2)


@pytest.mark.parametrize("make", [BLEU, WER, CER, EmptyTextRate])
def test_nothing_added_gives_no_score(make):
    metric = make()
    assert metric.compute() == {}
    metric.update("a", [], [])
    assert metric.compute() == {}


def test_error_rates_without_references_are_infinite():
    for metric in (WER(), CER()):
        metric.update("a", [""], ["hello"])
        assert metric.compute()[metric.key] == math.inf


def test_outer_spaces_are_characters():
    metric = CER(normalizer="none")
    metric.update("a", ["ab"], [" ab "])
    assert metric.compute()["cer"] == pytest.approx(1.0)


def test_hypotheses_of_white_space_are_empty():
    metric = EmptyTextRate()
    metric.update("a", ["x", "y", "z", ""], ["", " \n", "no", "."])
    assert metric.compute() == {"empty_text_rate_a": 0.5, "empty_text_rate": 0.5}


def test_texts_must_pair_up():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses of 'a'"):
        BLEU().update("a", ["x", "y"], ["x"])


def test_arguments_are_nemos(caplog):
    with caplog.at_level(logging.INFO):
        bleu = BLEU(normalize=False, normalizer=None, verbose=True).reset()
        bleu.update("set", ["one two three four"], ["one two three four"])
        WER(verbose=True).update("set", ["Yes, sir!"], ["yes no"])
        BLEU(verbose=False).update("set", ["a"], ["b"])
    assert [record.getMessage() for record in caplog.records] == [
        "reference:  one two three four\nhypothesis: one two three four [txt_bleu 100.00]",
        "reference:  Yes, sir!\nhypothesis: yes no [wer 0.50]",
    ]
    assert bleu.compute()["txt_bleu"] == pytest.approx(100)
    assert bleu.reset().compute() == {}
    upper = WER(normalizer=str.upper)
    upper.update("set", ["ONE"], ["one"])
    raw = WER(normalize=False)
    raw.update("set", ["ONE"], ["one"])
    assert (upper.compute()["wer"], raw.compute()["wer"]) == (0.0, 1.0)
