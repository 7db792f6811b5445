"""A GGUF file stands where a Hugging Face directory may: `model.pretrained_llm`, the tokenizer."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.models import SALM
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.llm_files import (
    llm_config,
    llm_generation_config,
    llm_weights,
    tokenizer_folder,
)
from speechlm2_jax.pretrained.salm import read_blueprint
from speechlm2_jax.settings import SettingsError
from tests.cases.test_weights_by_name import LLM
from tests.conversion.gguf_files import byte_level_keys, minimal, write_gguf
from tests.conversion.test_gguf import llm_file

KEY = "model.pretrained_llm"
TEXT = "Hello,  w\u00f6rld 123<|im_end|>"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "qwen3.gguf"
    ids = {"eos_token_id": 332, "padding_token_id": 330}
    tokens = byte_level_keys(LLM, "qwen2") | {f"tokenizer.ggml.{k}": v for k, v in ids.items()}
    llm_file("qwen3", path, **tokens)
    return path


def settings(llm: Path) -> dict:
    perception = {"modality_adapter": {"_target_": "x.IdentityConnector", "d_model": 16}}
    return {
        "pretrained_llm": str(llm),
        "pretrained_asr": str(LLM.parents[1] / "salm/asr.nemo"),
        "prompt_format": "qwen",
        "audio_locator_tag": "<|audioplaceholder|>",
        "perception": perception,
    }


def test_a_blueprint_of_a_file_is_that_of_its_directory(file):
    made, expected = read_blueprint(settings(file)), read_blueprint(settings(LLM))
    ours, theirs = made.network.llm, expected.network.llm
    assert replace(ours, init_std=theirs.init_std) == theirs  # a file tells no initialization
    assert made.tokenizer.text_to_ids(TEXT) == expected.tokenizer.text_to_ids(TEXT)
    assert len(made.tokenizer) == len(expected.tokenizer)
    assert (made.placeholder_id, made.pad_id) == (expected.placeholder_id, expected.pad_id)
    source, original = (llm_weights(b.llm_directory) for b in (made, expected))
    assert source.infos == original.infos
    for name in original.infos:
        np.testing.assert_array_equal(source.read(name), original.read(name), err_msg=name)


@pytest.mark.slow
def test_a_model_built_on_a_file_is_saved_whole(file, tmp_path):
    own = shutil.copy(file, tmp_path / "own.gguf")
    built, expected = SALM(settings(own)), SALM(settings(LLM))
    assert built.variables.keys() == expected.variables.keys()
    for path, value in expected.variables.items():
        if path.startswith("llm."):
            np.testing.assert_array_equal(built.variables[path], value, err_msg=path)
    built.save_pretrained(tmp_path / "saved")
    own.unlink()  # the saved model is complete without it
    again = SALM.from_pretrained(tmp_path / "saved")
    for path, value in built.variables.items():
        np.testing.assert_array_equal(again.variables[path], value, err_msg=path)
    assert again.tokenizer.text_to_ids(TEXT) == built.tokenizer.text_to_ids(TEXT)


def test_what_a_file_holds_is_found_below_a_directory_too(file):
    for path in (file, file.parent):
        assert llm_config(path, key=KEY)["model_type"] == "qwen3"
        assert llm_generation_config(path) == {"eos_token_id": [332, 330], "pad_token_id": 330}
        assert "model.embed_tokens.weight" in llm_weights(path).infos
        kind = registry.identify(path)
        assert kind is not None and kind.is_llm and "GGUF" in kind.what
        assert (tokenizer_folder(path, key=KEY) / "tokenizer.json").is_file()
    assert tokenizer_folder(LLM, key=KEY) == LLM


def test_a_file_that_is_not_supported_names_the_key(tmp_path):
    keys, tensors = minimal()
    path = write_gguf(tmp_path / "m.gguf", keys | {"general.architecture": "mamba"}, tensors)
    with pytest.raises(SettingsError, match=r"model\.pretrained_llm: .*m\.gguf.*'mamba'"):
        read_blueprint(settings(path))
    with pytest.raises(SettingsError, match=r"mm\.gguf'.*did you mean .*m\.gguf"):
        read_blueprint(settings(tmp_path / "mm.gguf"))
    other = write_gguf(tmp_path / "t.gguf", keys | {"tokenizer.ggml.pre": "mystery"}, tensors)
    with pytest.raises(SettingsError, match=r"model\.tokenizer_path: .*'mystery'"):
        tokenizer_folder(other, key="model.tokenizer_path")
