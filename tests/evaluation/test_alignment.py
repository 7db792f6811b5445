"""Word alignments: what happened at each place."""

import pytest

from speechlm2_jax.evaluation.metrics.alignment import align_words
from speechlm2_jax.evaluation.metrics.wer import word_errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b", "a b", [("equal", "a", "a"), ("equal", "b", "b")]),
        ("a b c", "a x y", [("equal", "a", "a"), ("substitute", "b", "x"),
                            ("substitute", "c", "y")]),
        ("a b c", "c", [("delete", "a", ""), ("delete", "b", ""), ("equal", "c", "c")]),
        ("c", "c d", [("equal", "c", "c"), ("insert", "", "d")]),
        ("", "x", [("insert", "", "x")]),
        ("x", "", [("delete", "x", "")]),
        ("", "", []),
    ],
)  # fmt: skip
def test_words_stand_beside_what_became_of_them(reference, hypothesis, expected):
    found = align_words(reference, hypothesis)
    assert [(w.operation, w.reference, w.hypothesis) for w in found] == expected


def test_the_alignment_shows_exactly_the_errors_that_are_counted():
    reference, hypothesis = "the cat sat on the red mat", "a cat on the the rod mat today"
    found = [w.operation for w in align_words(reference, hypothesis)]
    errors = word_errors([reference], [hypothesis])
    counts = (found.count("insert"), found.count("delete"), found.count("substitute"))
    assert counts == (errors.insertions, errors.deletions, errors.substitutions)
