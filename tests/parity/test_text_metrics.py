"""BLEU, word and character error rates equal those of NeMo 3.0.0, corner cases included."""

import json
from pathlib import Path

import pytest

from speechlm2_jax.evaluation.metrics.bleu import BLEU
from speechlm2_jax.evaluation.metrics.error_rates import CER, WER
from speechlm2_jax.evaluation.metrics.wer import text_normalizer

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "data" / "evaluation" / "text_metrics.json").read_text()
)
SINGLE = 1e-6  # NeMo rounds its scores to fp32


@pytest.mark.parametrize("text", GOLDEN["normalizer"])
def test_normaliser_equals_nemos(text):
    assert text_normalizer("english")(text) == GOLDEN["normalizer"][text]


def scores(metric, *names):
    for name in names:
        case = GOLDEN["cases"][name]
        metric.update(name if len(names) > 1 else "d", case["refs"], case["hyps"])
    return metric.compute()


@pytest.mark.parametrize("name", GOLDEN["cases"])
@pytest.mark.parametrize(("normalizer", "kind"), [("english", "norm"), ("none", "raw")])
def test_scores_of_one_set_equal_nemo(name, normalizer, kind):
    case = GOLDEN["cases"][name]
    bleu = scores(BLEU(normalizer=normalizer), name)
    assert bleu == pytest.approx(case[f"txt_bleu_{kind}"], rel=SINGLE)
    wer = scores(WER(normalizer=normalizer), name)
    assert wer == pytest.approx(case[f"wer_{kind}"], rel=SINGLE)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_character_error_rate_equals_nemo(name):
    expected = GOLDEN["cases"][name]["word_error_rate_cer_raw"]
    assert scores(CER(normalizer="none"), name)["cer"] == pytest.approx(expected, rel=SINGLE)


def test_the_total_is_the_plain_mean_over_sets():
    names = ("partial", "identical", "short")
    found = {**scores(BLEU(), *names), **scores(WER(), *names)}
    assert found == pytest.approx(GOLDEN["aggregate_three_datasets"], rel=SINGLE)
