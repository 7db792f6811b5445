"""The Open ASR Leaderboard's English: its normaliser, and how it counts word errors."""

import json
from pathlib import Path

import pytest

import speechlm2_jax as slm
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.metrics.wer import word_errors
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed

PAIRS = Path(__file__).parents[1] / "data" / "evaluation" / "leaderboard_normalizer.jsonl"


def test_all_texts_are_written_as_by_the_leaderboard():
    normalize = slm.text_normalizer("leaderboard")
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    differing = [p for p in pairs if normalize(p["text"]) != p["normalized"]]
    assert len(pairs) == 1023 and differing == []


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("What's Anna's? This's hers", "what is anna s this is hers"),  # a possessive stays an s
        ("a B.B.C. van, a 5 G mast", "abbc van a5g mast"),  # letters that stand side by side
        ("so I a we", "so i a we"),  # two words, no abbreviation
        ("Ahem, ah, kinda huh", "ahem kinda"),  # more fillers, fewer words written out
        ("Stephen and Kathryn MacDonald", "steven and catherine mcdonald"),  # variants of names
        ("X-ray by e mail, how ever", "xray by email however"),  # compounds
        ("a flyer on archaeology, ok", "a flier on archeology okay"),  # spellings
    ],
)
def test_rules(text, written):
    assert slm.text_normalizer("leaderboard")(text) == written


def test_words_that_differ_only_in_spaces_are_no_error():
    texts = ["any more tea", "the data base"], ["anymore tea", "the basis"]
    assert word_errors(*texts, merge_compounds=True).plain() == {
        "wer": 2 / 6,
        "insertions": 0,
        "deletions": 1,
        "substitutions": 1,
        "reference_words": 6,
        "utterances": 2,
    }
    assert word_errors(*texts).errors == 4
    assert word_errors(["", "a"], ["b", "a"], merge_compounds=True).plain()["insertions"] == 1


@pytest.mark.parametrize(("normalizer", "errors"), [("leaderboard", 0), ("english", 2)])
def test_an_evaluation_scores_as_its_normalizer_does(normalizer, errors):
    response = Response(id="a", duration_s=1.0, text="Any more?", pred_text="anymore")
    found = Evaluation(responses=(response,), speed=Speed(), normalizer=normalizer)
    assert found.word_errors().errors == errors


def test_an_unknown_normalizer_is_refused_with_the_names():
    with pytest.raises(ValueError, match="english, basic, leaderboard, none"):
        slm.text_normalizer("board")
    with pytest.raises(ValueError, match="english, basic, leaderboard, none"):
        EvalConfig(pretrained_name="a", inputs="b", use_normalizer="board")
