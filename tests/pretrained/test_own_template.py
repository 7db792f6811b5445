"""A SALM without `prompt_format` takes its LLM's chat template, and its saved form keeps it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.inference.generate import PromptInputs, prepare_prompts
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.chat_templates import MISTRAL, TAG, tokenizer_with

DATA = Path(__file__).parents[1] / "data"


def settings(llm, **changes):
    recorded = json.loads((DATA / "salm" / "llama_adapter.json").read_text())["cfg_in"]
    components = {"pretrained_llm": str(llm), "pretrained_asr": str(DATA / "salm" / "asr.nemo")}
    recorded = {key: value for key, value in recorded.items() if key != "prompt_format"}
    return {**recorded, **components, "pretrained_weights": False, **changes}


@pytest.fixture
def llm(tmp_path):
    folder = tmp_path / "llm"
    tokenizer_with(MISTRAL, folder, "llm/llama")
    shutil.copy(DATA / "llm" / "llama" / "config.json", folder)
    return folder


def test_it_is_the_default_and_is_saved(llm, tmp_path):
    model = SALM(settings(llm))
    assert model.prompt_formatter.name == model.cfg["prompt_format"] == "auto"
    model.save_definition(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["prompt_format"] == "auto"
    shutil.rmtree(llm)
    again = SALM(
        {
            **{key: value for key, value in saved.items() if key in settings(llm)},
            "prompt_format": saved["prompt_format"],
            "pretrained_llm": str(tmp_path / "saved" / "llm_backbone"),
            "tokenizer_path": str(tmp_path / "saved"),
        }
    )
    prompt = [[{"role": "user", "content": f"Say {TAG} now", "audio": np.zeros(1600, np.float32)}]]
    inputs = PromptInputs(prompt)
    for one in (model, again):
        ((example,), ids) = prepare_prompts(one._engine_on({}, None), inputs)
        text = one.tokenizer.ids_to_text(ids[0], remove_special_tokens=False)
        assert text.replace(" ", "") == f"<s>[INST]Say{TAG}now[/INST]"
        assert np.sum(example.tokens == one.audio_locator_tag_id) == len(example.audio) == 1


def test_without_a_template_the_key_is_required(tmp_path):
    with pytest.raises(SettingsError, match="^model.prompt_format: required, because tokenizer"):
        SALM(settings(DATA / "llm" / "llama"))


def test_a_format_that_does_not_fit_is_an_error_of_the_key(llm):
    with pytest.raises(SettingsError, match=r"^model.prompt_format: .*set prompt_format to auto"):
        SALM(settings(llm, prompt_format="qwen"))
