"""Validation of the duplex models equals NeMo 3.0.0's: texts, transcripts, scores."""

from dataclasses import replace

import pytest

from speechlm2_jax.evaluation.duplex import scoring
from speechlm2_jax.evaluation.metrics.wer import text_normalizer
from tests.parity.duplex_golden import DATA, MODELS, examples, facts, pretrained

SETS = {"set0": "pair", "set1": "rest"}
SINGLE = 1e-6  # NeMo rounds its scores to fp32


@pytest.mark.slow
@pytest.mark.parametrize("run", MODELS)
def test_validation_scores_equal_nemos(run):
    recorded = facts(run)["validation"]
    normalize = text_normalizer("english")
    model = pretrained(run, nemo_exact=True)  # long silences stay, as in NeMo
    with scoring.scoring(model, str(DATA / "assets" / "asr_scoring.nemo")) as scorer:
        for name, batch in SETS.items():
            conversations = [
                replace(example, target_text=text)
                for example, text in zip(
                    examples(batch), recorded["refs_normalized"][name], strict=True
                )
            ]
            responses = scorer.generate_and_score(name, conversations)
            texts = [normalize(response.text) for response in responses]
            asr_texts = [normalize(response.asr_text) for response in responses]
            assert texts == recorded["txt_hyps_normalized"][name]
            assert asr_texts == recorded["asr_hyps_normalized"][name]
        scores = scorer.compute()
    expected = {key.removeprefix("val_"): value for key, value in recorded["metrics"].items()}
    assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=SINGLE)
