"""Totals and table: by voice, by length, unseen voices, swapped audio."""

from dataclasses import replace

import pytest

from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from speechlm2_jax.evaluation.score_table import table
from tests.evaluation.page_case import small_case


def test_errors_by_voice_and_length_add_up_to_the_total():
    totals = small_case()[0].totals()
    for key in ("by_voice", "by_length"):
        for count in ("insertions", "deletions", "substitutions", "reference_words"):
            assert sum(group[count] for group in totals[key].values()) == totals[count]
    assert list(totals["by_voice"]) == ["anna", "ben", "cleo"]
    assert list(totals["by_length"]) == ["0 to 1 s", "1 to 2 s", "2 to 3 s", "3 to 4 s"]
    assert totals["by_voice"]["anna"]["wer"] == pytest.approx(1 / 9)


def test_unseen_voices_are_counted_alone_and_named():
    totals = small_case()[0].totals()
    assert totals["unseen_voices"] == ["cleo"]
    assert (totals["unseen"]["reference_words"], totals["unseen"]["deletions"]) == (2, 1)
    lines = [" ".join(line.split()) for line in table(totals).splitlines()]
    assert "WER, unseen voices 50.00% over 2 words" in lines
    assert lines[:3] == [
        "cleo, unseen 50.00% over 2 words",
        "anna 11.11% over 9 words",
        "ben 111.11% over 9 words",
    ]


def test_without_voices_the_table_has_no_voices():
    responses = (Response(id="a", duration_s=1.0, text="x", pred_text="x"),)
    totals = Evaluation(responses=responses, speed=Speed()).totals()
    assert (totals["by_voice"], totals["unseen"]) == ({}, None)
    assert "unseen" not in table(totals)


def test_swapped_audio_is_named_as_such():
    result = small_case()[0]
    swapped = replace(
        result, responses=tuple(replace(r, audio_of="other") for r in result.responses)
    )
    assert "WER, audio swapped" in table(swapped.totals())
    assert {row["audio_of"] for row in swapped.rows()} == {"other"}
    assert "swapped" not in table(result.totals())


@pytest.mark.parametrize(
    ("seconds", "name"),
    [(0.0, "0 to 1 s"), (1.0, "1 to 2 s"), (5.99, "4 to 6 s"), (30.0, "over 30 s")],
)
def test_length_classes_hold_their_lower_edge(seconds, name):
    assert Response(id="a", duration_s=seconds, text=None, pred_text="").length == name
