"""Word errors: counts of a corpus, and the normalisation before them."""

import pytest

from speechlm2_jax.evaluation.metrics.alignment import align_words
from speechlm2_jax.evaluation.metrics.wer import text_normalizer, word_errors


def test_counts_are_summed_over_the_corpus():
    errors = word_errors(
        ["a b c d", "one two", "same text here"], ["a x c", "one one two", "same text here"]
    )
    assert (errors.insertions, errors.deletions, errors.substitutions) == (1, 1, 1)
    assert errors.reference_words == 9
    assert errors.wer == pytest.approx(3 / 9), "errors over words of the corpus, not a mean of WERs"
    assert errors.rate(errors.insertions) == pytest.approx(1 / 9)


@pytest.mark.parametrize("space", ["\n", "\t", "\u00a0", "\u3000", " \n "])
def test_any_white_space_separates_words(space):
    errors = word_errors(["a b c"], [f"a{space}b c"])
    assert (errors.errors, errors.reference_words) == (0, 3)
    assert word_errors([f"a{space}b"], ["a b"]).errors == 0
    assert [w.operation for w in align_words(f"a{space}b", "a b")] == ["equal", "equal"]


def test_hypotheses_of_empty_references_count_as_insertions():
    errors = word_errors(["", "a b", "  "], ["x y", "", ""])
    assert (errors.insertions, errors.deletions, errors.empty_references) == (2, 2, 2)
    assert errors.wer == pytest.approx(4 / 2)


def test_no_reference_words_at_all_give_no_rate_rather_than_nan():
    assert word_errors([""], ["x"]).wer is None
    assert word_errors([], []).wer is None


def test_references_and_hypotheses_must_pair():
    with pytest.raises(ValueError, match="2 references but 1"):
        word_errors(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("english", "mister smith is 25"),
        (True, "mister smith is 25"),
        ("basic", "mr smith s twenty five "),
        ("none", "Mr. Smith's twenty-five!"),
        ("None", "Mr. Smith's twenty-five!"),
        (False, "Mr. Smith's twenty-five!"),
        (None, "Mr. Smith's twenty-five!"),
    ],
)
def test_normalizers_by_name(name, expected):
    assert text_normalizer(name)("Mr. Smith's twenty-five!") == expected


def test_an_unknown_normalizer_is_refused_by_name():
    with pytest.raises(
        ValueError, match="'german' is unknown; use english, basic, leaderboard, none"
    ):
        text_normalizer("german")
