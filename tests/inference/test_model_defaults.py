"""What a call of `generate` leaves open comes from the LLM's own files; what it sets overrides."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.run import end_ids
from speechlm2_jax.inference.request.generation_request import read_request
from speechlm2_jax.models.salm import SALM
from tests.data_pipeline.chat_templates import CHATML, MISTRAL, tokenizer_with

DATA = Path(__file__).parents[1] / "data"
CHAT = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def model_of(file, end=(2, 7)):
    return SimpleNamespace(
        text_eos_id=2,
        text_pad_id=0,
        text_vocab_size=100,
        end_ids=end,
        generation_defaults=file,
    )


def equal(file, keys, explicit):
    """Whether `keys` with the file are what `explicit` is without one."""
    asked = read_request(model_of(file), keys)
    wanted = read_request(model_of({}), explicit)
    assert asked == wanted


@pytest.mark.parametrize(
    ("file", "keys", "explicit"),
    [
        ({"repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"max_new_tokens": 64, "max_length": 90}, {}, {"max_new_tokens": 64, "max_length": 90}),
        ({"max_new_tokens": 64, "max_length": 90}, {"max_length": 30}, {"max_length": 30}),
        ({"max_new_tokens": 64}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"no_repeat_ngram_size": 2}, {}, {"no_repeat_ngram_size": 2}),
        ({"num_beams": 3, "length_penalty": 0.5}, {}, {"num_beams": 3, "length_penalty": 0.5}),
        ({"length_penalty": 0.5}, {}, {}),
        # greedy, as NeMo's saved models are, unless the call asks for sampling
        (CHAT, {}, {}),
        (CHAT, {"do_sample": True}, CHAT),
        (CHAT, {"do_sample": True, "top_k": 5}, {**CHAT, "top_k": 5}),
        # the model's own, and what only a call decides
        ({"pad_token_id": 9, "bos_token_id": 1, "num_return_sequences": 2}, {}, {}),
        ({"eos_token_id": 9}, {}, {}),
        ({"eos_token_id": 9}, {"eos_token_id": [4]}, {"eos_token_id": [4]}),
        ({"transformers_version": "5.1", "chat_format": "x", "penalty_alpha": 0.0}, {}, {}),
        ({"temperature": None}, {"do_sample": True}, {"do_sample": True}),
    ],
)
def test_the_file_sets_what_the_call_does_not(file, keys, explicit):
    equal(file, keys, explicit)


def test_all_end_tokens_stop_a_response():
    assert read_request(model_of({})).decoding.stop_ids == (2, 7)
    assert read_request(model_of({}, end=()), {}).decoding.stop_ids == ()
    assert read_request(model_of({}), {"eos_token_id": []}).decoding.stop_ids == ()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("penalty_alpha", 0.6, "not supported"),
        ("suppress_tokens", [5, 500], "this vocabulary has 100 tokens"),
        ("repetition_penalty", "much", "must be a positive number"),
    ],
)
def test_what_is_wrong_in_the_file_is_left_out_with_one_warning(key, value, reason, caplog):
    for _ in range(2):
        equal({key: value, "max_new_tokens": 8}, {}, {"max_new_tokens": 8})
    (record,) = caplog.records
    assert key in record.message and reason in record.message
    assert "generation_config.json" in record.message


@pytest.fixture
def llm(tmp_path):
    folder = tmp_path / "llm"
    tokenizer_with(None, folder, "llm/llama")
    config = json.loads((DATA / "llm" / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 11]}))
    file = {**CHAT, "eos_token_id": [2, 7, 5_000], "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(file))
    return folder


def settings(llm):
    recorded = json.loads((DATA / "salm" / "llama_adapter.json").read_text())["cfg_in"]
    components = {"pretrained_llm": str(llm), "pretrained_asr": str(DATA / "salm" / "asr.nemo")}
    return {**recorded, **components, "pretrained_weights": False}


def test_a_model_has_the_end_tokens_of_all_files_and_its_saved_form_keeps_them(llm, tmp_path):
    model = SALM(settings(llm))
    assert model.text_eos_id == 2 and model.end_ids == (2, 7, 11)
    assert model.generation_defaults["max_new_tokens"] == 3
    assert end_ids(model, EvalConfig(pretrained_name="x", inputs="y")) == [2, 7, 11]
    model.save_definition(tmp_path / "saved")
    shutil.rmtree(llm)
    saved = tmp_path / "saved"
    again = SALM(
        {
            **settings(saved / "llm_backbone"),
            "tokenizer_path": str(saved),
        }
    )
    assert again.end_ids == model.end_ids
    assert again.generation_defaults == model.generation_defaults


def test_auto_adds_the_tokens_that_its_template_ends_responses_with(tmp_path):
    for name, template, expected in (
        ("chatml", CHATML, ["</s>", "<|im_end|>"]),
        ("mistral", MISTRAL, ["</s>"]),
    ):
        tokenizer = tokenizer_with(template, tmp_path / name)
        config = json.loads((DATA / "llm" / "llama" / "config.json").read_text())
        config |= {"vocab_size": 400, "eos_token_id": tokenizer.eos_id}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        model = SALM({**settings(tmp_path / name), "prompt_format": "auto"})
        assert model.tokenizer.ids_to_tokens(model.end_ids) == expected


@pytest.mark.slow
def test_a_response_ends_at_the_first_of_them():
    model = SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf")
    prompt = [[{"role": "user", "content": "What time is it?"}]]
    whole = model.generate(prompt, max_new_tokens=8, eos_token_id=[])[0, -8:]
    third = int(whole[2])
    model._blueprint = replace(
        model._blueprint,
        end_ids=(model.text_eos_id, third),
        generation_defaults={"max_new_tokens": 8, **CHAT},
    )
    first = int(np.flatnonzero(whole == third)[0])
    ids = model.generate(prompt)[0]
    np.testing.assert_array_equal(ids[-(first + 1) :], whole[: first + 1])
    piece = list(model.stream(prompt))
    assert sum(len(p.ids) for p in piece) == first + 1
