"""Spacing: no space before punctuation, as in NeMo."""

from speechlm2_jax.asr.punctuation import attach_punctuation, punctuation_marks


def test_marks_are_those_of_pieces_that_continue_a_word():
    pieces = ["<unk>", "▁a", ",", ".", "n't", "▁-", "[en]", "##;", "  ", "b", "“"]
    assert punctuation_marks(pieces) == {",", ".", "'", "“"}


def test_one_space_before_a_mark_is_dropped_and_no_more():
    assert attach_punctuation("yes , no  . why ?", {",", "."}) == "yes, no . why ?"
    assert attach_punctuation("a - b", set()) == "a - b"
