"""Bad input is one clear line that names the fix and exit code 2, before anything is compiled."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from speechlm2_jax import experiment
from speechlm2_jax.batches import HostBatch
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.validation_scores import word_error_rate

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


@pytest.fixture
def config(tmp_path):
    """A complete SALM YAML over the golden parts and one recording."""
    soundfile.write(tmp_path / "a.wav", np.zeros(8000, np.float32) + 0.01, 16000)
    row = {"audio_filepath": "a.wav", "duration": 0.5, "text": "yes"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    recorded = json.loads((DATA / "salm" / "llama_adapter.json").read_text())["cfg_in"]
    source = {
        "type": "lhotse_as_conversation",
        "manifest_filepath": str(tmp_path / "train.jsonl"),
        "audio_locator_tag": "<|audioplaceholder|>",
        "tags": {"context": "Say:"},
    }
    settings = {
        "model": {
            **recorded,
            "pretrained_llm": str(DATA / "llm" / "llama"),
            "pretrained_asr": str(DATA / "salm" / "asr.nemo"),
        },
        "trainer": {"max_steps": 2, "precision": "32-true", "accelerator": "cpu"},
        "data": {
            "train_ds": {
                "sample_rate": 16000,
                "prompt_format": "llama2",
                "token_equivalent_duration": 0.08,
                "input_cfg": [source],
                "batch_size": 1,
            }
        },
        "exp_manager": {"explicit_log_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "salm.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


ADAPTER = "model.perception.modality_adapter"
CASES = {
    "unknown model key": (["+model.freeze_parms=[]"], ["model", "freeze_params"]),
    "unknown trainer key": (["+trainer.max_step=3"], ["trainer", "max_steps"]),
    "unknown data key": (["+data.train_ds.batchsize=3"], ["data.train_ds", "batch_size"]),
    "unknown adapter key": ([f"+{ADAPTER}.n_layer=3"], [ADAPTER, "n_layers"]),
    "override of a key that is not there": (["trainer.max_stepz=3"], ["max_steps"]),
    "required value": (["model.pretrained_llm=???"], ["model.pretrained_llm"]),
    "wrong type": (["trainer.max_steps=soon"], ["trainer.max_steps"]),
    "missing manifest": (
        ["data.train_ds.input_cfg.0.manifest_filepath=/nowhere.jsonl"],
        ["/nowhere.jsonl"],
    ),
    "missing LLM": (["model.pretrained_llm=./nowhere"], ["model.pretrained_llm", "./nowhere"]),
    "missing .nemo": (["model.pretrained_asr=nowhere.nemo"], ["model.pretrained_asr"]),
    "missing token": (
        ["model.prompt_format=qwen"],
        ["model.prompt_format", "<|im_start|>", "llm/llama", "set prompt_format to", "llama2"],
    ),
    "no prompt format": (["model.prompt_format=null"], ["model.prompt_format: required", "plain"]),
    "no chat template": (["model.prompt_format=auto"], ["model.prompt_format", "chat template"]),
    "unknown prompt format": (["model.prompt_format=klingon"], ["klingon", "llama2"]),
    "adapter width": ([f"{ADAPTER}.feat_in=99"], ["feat_in=99", "16"]),
    "vggnet": ([f"{ADAPTER}.subsampling=vggnet"], ["vggnet"]),
    "16-bit float": (["trainer.precision=16-mixed"], ["16-mixed", "bf16"]),
    "unknown optimizer": (["model.optimizer._target_=os.system"], ["os.system"]),
    "unknown schedule": (["+model.lr_scheduler._target_=a.Steps"], ["Steps"]),
    "freeze pattern": (["model.freeze_params=[^lm\\..+]"], ["freeze_params"]),
    "missing accelerator": (["trainer.accelerator=gpu"], ["gpu"]),
    "no devices": (["+trainer.devices=512"], ["512"]),
    "unknown adapter": ([f"{ADAPTER}._target_=x.Perceiver"], ["Perceiver"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_line_names_what_to_change(config, case, monkeypatch, capsys):
    monkeypatch.setattr(
        "speechlm2_jax.pretrained.blueprint.random_variables", lambda *_: pytest.fail("compiled")
    )
    overrides, expected = CASES[case]
    with pytest.raises(SystemExit) as stopped, experiment.clear_errors("train.py"):
        experiment.build(config, overrides)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("train.py: ") and line.count("\n") == 1
    for word in expected:
        assert word in line, line


def test_weights_that_lack_a_tensor_are_named(config, tmp_path, capsys):
    broken = tmp_path / "llm"
    broken.mkdir()
    for file in (DATA / "llm" / "llama").iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit), experiment.clear_errors("train.py"):
        experiment.build(config, [f"model.pretrained_llm={broken}"])
    assert "has no weights" in capsys.readouterr().err


def test_the_command_exits_with_code_2(config):
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config)]
    done = subprocess.run(
        [*command, "trainer.max_stepz=3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "max_steps" in done.stderr and "Traceback" not in done.stderr


def test_a_good_file_builds(config):
    run = experiment.build(config)
    assert run.model.sampling_rate == 16000
    assert run.model.token_equivalent_duration == pytest.approx(0.08)


def test_word_error_rate_counts_reference_words(config):
    metric = word_error_rate(experiment.build(config).model)
    empty = metric(HostBatch(arrays=None, ids=(), bucket="", references=()))
    assert (empty.total, empty.count) == (0.0, 0.0)
    assert isinstance(SettingsError("x"), ValueError)
