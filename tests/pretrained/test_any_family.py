"""A directory of any family starts `--config salm`, generates, and is saved and opened again."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from speechlm2_jax.llm.families import FAMILIES
from speechlm2_jax.models.salm import SALM
from tests.data_pipeline.chat_templates import CHATML, TAG, tokenizer_with
from tests.parity.tiny_families import tiny_model

ROOT = Path(__file__).parents[2]
ASR = ROOT / "tests/data/salm/asr.nemo"
RATE = 16000


def settings(llm):
    """The model block of configs/salm.yaml; only the components are others."""
    block = yaml.safe_load((ROOT / "configs/salm.yaml").read_text())["model"]
    recorded = json.loads((ROOT / "tests/data/salm/llama_adapter.json").read_text())["cfg_in"]
    perception = recorded["perception"]  # the adapter that fits the small encoder
    return {**block, "pretrained_llm": str(llm), "pretrained_asr": str(ASR)} | {
        "perception": perception
    }


def respond(model):
    audio = np.random.default_rng(0).normal(size=RATE // 2).astype(np.float32) / 10
    dialog = [{"role": "user", "content": f"Say {TAG} now", "audio": audio}]
    return model.generate([dialog], max_new_tokens=5).tolist()


@pytest.mark.slow  # three programs of each family
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_starts_generates_and_is_opened_again(family, tmp_path):
    tokenizer = tokenizer_with(CHATML, tmp_path / "llm")
    size = {"vocab_size": tokenizer.vocab_size + 8}
    tiny_model(family, **size).save_pretrained(tmp_path / "llm")
    model = SALM(settings(tmp_path / "llm"))
    assert model.prompt_formatter.name == "auto"
    response = respond(model)
    model.save_pretrained(tmp_path / "saved")
    again = SALM.from_pretrained(tmp_path / "saved")
    assert respond(again) == response
    assert any(path.endswith("lora_a") for path in again.variables)
