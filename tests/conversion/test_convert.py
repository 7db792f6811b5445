"""convert.py turns checkpoints into directories that load equal, and refuses in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import main
from speechlm2_jax.conversion.listing import remark, table
from speechlm2_jax.conversion.readers import memory_source, open_weights, read_nemo
from speechlm2_jax.pretrained.registry import SPEECH_MODELS, identify
from tests.conversion.goldens import DATA, SALM, assert_same_bits, tensors

ROOT = DATA.parents[1]


def test_nemo_archive_becomes_a_directory_with_all_its_parts(tmp_path, capsys):
    assert main([str(SALM / "asr.nemo"), str(tmp_path / "asr")]) == 0
    archive = read_nemo(SALM / "asr.nemo")
    assert_same_bits(tensors(open_weights(tmp_path / "asr")), tensors(archive.weights))
    for name in set(archive.members) - {"model_weights.ckpt"}:
        assert (tmp_path / "asr" / name).read_bytes() == archive.artifact(name)
    assert "96 tensors" in capsys.readouterr().out


def test_nemo_archive_comes_back_from_the_directory_and_from_itself(tmp_path, capsys):
    assert main([str(SALM / "asr.nemo"), str(tmp_path / "asr")]) == 0
    assert main([str(tmp_path / "asr"), str(tmp_path / "back.nemo")]) == 0
    assert main([str(SALM / "asr.nemo"), str(tmp_path / "copy.nemo")]) == 0
    assert (tmp_path / "back.nemo").read_bytes() == (tmp_path / "copy.nemo").read_bytes()
    assert "back.nemo: 96 tensors" in capsys.readouterr().out
    original, copy = read_nemo(SALM / "asr.nemo"), read_nemo(tmp_path / "back.nemo")
    assert copy.config == original.config
    assert_same_bits(tensors(copy.weights), tensors(original.weights))
    for name in set(original.members) - {"model_weights.ckpt", "model_config.yaml"}:
        assert copy.artifact(name) == original.artifact(name)


def test_torch_file_becomes_safetensors_with_tied_names(tmp_path):
    import torch

    weight = torch.arange(6.0).reshape(2, 3).bfloat16()
    torch.save({"b": weight, "a": weight, "n": torch.tensor(3)}, tmp_path / "model.bin")
    assert main([str(tmp_path / "model.bin"), str(tmp_path / "out")]) == 0
    source = open_weights(tmp_path / "out")
    assert source.aliases == {"b": "a"}
    assert source.read("a").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read("a"), weight.float().numpy())


def test_hugging_face_directory_keeps_its_config_and_tokenizer(tmp_path):
    assert main([str(DATA / "llm/llama"), str(tmp_path / "out")]) == 0
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (DATA / "llm/llama" / name).read_bytes()
    expected = tensors(open_weights(DATA / "llm/llama"))
    assert_same_bits(tensors(open_weights(tmp_path / "out")), expected)


def test_speech_models_are_told_from_plain_weights():
    for name in ("qwen3_lora_hf", "qwen3_lora.ckpt"):
        kind = identify(SALM / name)
        assert kind is not None and kind.classes[0] in SPEECH_MODELS
    for path in (SALM / "asr.nemo", DATA / "llm/llama"):
        kind = identify(path)
        assert kind is not None and not set(kind.classes) & set(SPEECH_MODELS)


def test_lightning_checkpoint_becomes_nemos_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(SALM)  # the checkpoint names its LLM relative to itself
    assert main(["qwen3_lora.ckpt", str(tmp_path / "out"), "--no-self-test"]) == 0
    expected = (SALM / "qwen3_lora_hf/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == expected


def test_inspect_lists_every_tensor_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(SALM / "qwen3_lora_hf"), "--inspect"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 128 + 1 + 1
    assert listed[0].split() == ["embed_tokens.weight", "[341,", "48]", "float32"]
    assert "same tensor as embed_tokens.weight" in listed[1]
    assert listed[-1] == "128 tensors, 324240 bytes, 0 with a remark"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros((2, 2), np.float32), "all zeros"),
        (np.full(3, 0.5, ml_dtypes.bfloat16), "constant 0.5"),
        (np.array([0.0, np.nan], np.float32), "not finite"),
        (np.array([0, np.inf], np.float16), "not finite"),
        (np.array([1, 2], np.int64), ""),
        (np.array(0, np.int64), ""),
        (np.zeros(0, np.float32), "empty"),
        (np.array([True, False]), ""),
    ],
)
def test_suspect_values_are_remarked(values, expected):
    assert remark(values) == expected


def test_table_counts_what_is_suspect():
    text = table(memory_source({"a": np.zeros(2, np.float32), "b": np.arange(2)}, {"c": "a"}))
    assert text.splitlines()[-1] == "2 tensors, 24 bytes, 1 with a remark"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere.nemo", "out"], "nowhere.nemo"),
        (["file.txt", "out"], "none of .safetensors"),
        (["model.nemo", "out"], "damaged"),
        (["model.nemo", "."], "exists"),
        (["model.nemo", "model.nemo"], "exists"),
        (["model.nemo", "file.txt"], "ends in .nemo"),
        ([str(DATA / "llm/llama"), "new.nemo"], "has no model_config.yaml"),
        ([str(SALM / "qwen3_lora_hf"), "new.nemo"], "name one"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("model.nemo").write_bytes(b"x" * 600)
    if match == "exists":
        Path("model.safetensors").touch()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and match in captured.err
    assert not Path("out").exists()


def test_the_script_runs_as_a_command():
    command = [sys.executable, "convert.py", str(SALM / "asr.nemo"), "--inspect"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "encoder.layers.1.norm_out.weight" in result.stdout
    assert subprocess.run([*command[:2], "x", "--inspect"], cwd=ROOT).returncode == 2


def snippet(number: int) -> dict:
    """Runs one example of the documentation; its variables."""
    page = (ROOT / "docs/conversion.md").read_text()
    scope: dict = {}
    exec(page.split("```python")[number].split("```")[0], scope)
    return scope


def test_the_snippets_of_the_documentation_run(monkeypatch, tmp_path):
    monkeypatch.chdir(SALM)
    scope = snippet(1)
    assert_same_bits(scope["tensors"], tensors(scope["source"]))
    shutil.copy(SALM / "asr.nemo", tmp_path)
    monkeypatch.chdir(tmp_path)
    scope = snippet(2)
    assert_same_bits(tensors(open_weights("copy.nemo")), scope["state"])
