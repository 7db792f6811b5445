"""What a review of the fixes found: the same kinds, with other inputs."""

import json
from pathlib import Path

import pytest

from speechlm2_jax import parameter_paths
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.data.manifest_values import missing_key
from speechlm2_jax.evaluation.duplex.plan import find_model
from speechlm2_jax.evaluation.inputs import read_inputs
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run import run_lock

LLM = json.loads((Path(__file__).parents[1] / "data/llm/qwen3/config.json").read_text())
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "scaling",
    [
        LINEAR,
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "default", "mrope_section": [1]},
    ],
)
def test_two_rotary_blocks_that_differ_are_refused(scaling):
    assert LLM["rope_parameters"]
    with pytest.raises(ConversionError, match="rotary scaling|rope_scaling"):
        decoder_config({**LLM, "rope_scaling": scaling})


def test_two_rotary_blocks_that_agree_are_one():
    new = {**LINEAR, "rope_theta": 1e6}
    both = decoder_config({**LLM, "rope_parameters": new, "rope_scaling": LINEAR})
    assert both == decoder_config({**LLM, "rope_parameters": new})
    assert both.rope.scaling is not None


def test_a_posix_class_of_a_freeze_pattern_is_refused():
    with pytest.raises(parameter_paths.PatternError, match="POSIX"):
        parameter_paths._compiled("model.freeze_params", "[[:alpha:]]+")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"token": "a\\u0000b"}', '{"pid": 0}'])
def test_a_lock_that_cannot_be_read_is_no_traceback(tmp_path, content):
    path = tmp_path / "run.lock"
    path.write_text(content)
    assert run_lock._read(path)[0] is None


def test_a_lock_that_is_no_regular_file_is_one_line(tmp_path):
    (tmp_path / "run.lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="is no regular file"):
        run_lock.acquire(tmp_path)


def test_a_null_key_is_not_called_misspelt():
    assert missing_key({"audio_filepath": None}, "audio_filepath").startswith(
        "audio_filepath is null"
    )


def test_inputs_may_be_a_path(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('\ufeff{"audio_filepath": "a.wav", "duration": 0.5, "text": "yes"}\n')
    (utterance,) = read_inputs(manifest)
    assert utterance.text == "yes"


def test_a_misspelt_argument_of_evaluate_is_named_before_a_model_is_looked_for():
    with pytest.raises(SettingsError, match="did you mean 'pretrained_name'"):
        find_model({"pretrained_nam": "runs/salm"})
