"""The metric of instructions: the form that was asked for, and the content."""

import pytest

from speechlm2_jax.evaluation.metrics.instructions import form_of
from speechlm2_jax.evaluation.metrics.resampling import estimate
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS

METRIC = TASK_METRICS["instruction"]
SENTENCE = "my sister bought three apples at the market on monday"
QUESTION = "did my sister buy three apples at the market on monday"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("m o n d a y", "spelling"),
        ("M. O. N.", "spelling"),
        ("a", "phrase"),
        ("at the market", "phrase"),
        (SENTENCE, "sentence"),
        (f"{QUESTION}?", "question"),
        ("Can it", "question"),
        (" ... ", None),
    ],
)
def test_forms(text, form):
    assert form_of(text) == form


@pytest.mark.parametrize(
    ("reference", "response", "is_right"),
    [
        ("m a p", "M a p", True),
        ("m a p", "map", False),
        ("m a p", "m a t", False),
        ("at the market", "At the market.", True),
        ("at the market", "the market", False),
        (SENTENCE, SENTENCE.replace("apples", "books").replace("three", "two"), True),  # 2 of 10
        (SENTENCE, SENTENCE.replace("three apples at", "two books in"), False),
        (SENTENCE, QUESTION, False),
        (QUESTION, SENTENCE, False),
        (QUESTION, QUESTION, True),
        (SENTENCE, "", False),
    ],
)
def test_a_response_needs_form_and_content(reference, response, is_right):
    assert estimate(METRIC, [(reference, response)], "basic").value == 100 * is_right


def test_shares_by_form():
    pairs = [("m a p", "m a t"), ("m a p", "map"), ("monday", "monday"), (SENTENCE, QUESTION)]
    assert METRIC.details(pairs, "basic") == {
        "of the asked form": 50,
        "sentence, asked form": 0,
        "sentence, right": 0,
        "spelling, asked form": 50,
        "spelling, right": 0,
        "phrase, asked form": 100,
        "phrase, right": 100,
    }
    assert METRIC.details([("", "a")], "basic") == {}
    assert estimate(METRIC, [("", "a")], "basic").value is None
