"""SALM's `generate` under a GenerationConfig equals NeMo 3.0.0's: beams, processors, lengths."""

import json

import numpy as np
import pytest
from transformers import GenerationConfig

from speechlm2_jax.models import SALM
from tests.parity.salm_golden import DATA, facts, tensors

RUN = "llama_adapter"
RECORDED = json.loads((DATA / f"{RUN}_decoding.json").read_text())
SCORE_ATOL = 1e-4


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(DATA / f"{RUN}_hf").eval()


@pytest.mark.parametrize(
    "name",
    [
        "audio_beams",
        "text_processed",
        pytest.param("audio_processed", marks=pytest.mark.slow),
        pytest.param("audio_max_length", marks=pytest.mark.slow),
        pytest.param("text_max_length", marks=pytest.mark.slow),
    ],
)
def test_generated_tokens_equal_nemo(model, name):
    case = RECORDED[name]
    kind = "generate_prompts" if name.startswith("audio") else "generate_text_prompts"
    asked = {"prompts": facts(RUN)[kind]["dialog"]}
    if name.startswith("audio"):
        batch = tensors(RUN)
        asked |= {"audios": batch["batch/audios"], "audio_lens": batch["batch/audio_lens"]}
    if name.endswith("max_length"):
        asked = {key: value[:1] for key, value in asked.items()}
    got = model.generate(
        **asked,
        generation_config=GenerationConfig(**case["keys"]),
        return_dict_in_generate=True,
    )
    np.testing.assert_array_equal(got.sequences, case["sequences"])
    if "scores" in case:
        np.testing.assert_allclose(got.sequences_scores, case["scores"], atol=SCORE_ATOL)
