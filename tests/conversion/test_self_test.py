"""convert.py reports what became of every tensor, and compares what it wrote with the source."""

import os
from pathlib import Path

import numpy as np
import pytest

from convert import main
from speechlm2_jax.conversion.coverage import coverage
from speechlm2_jax.conversion.mapping import Ignored, Rule, Table
from speechlm2_jax.conversion.readers import memory_source, open_weights, write_safetensors
from speechlm2_jax.inference.probe import compare
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.models import export
from tests.conversion.goldens import DATA, SALM, tensors
from tests.parity.duplex_golden import hf

LLAMA = DATA / "llm/llama"


def info(*shape: int) -> VariableInfo:
    return VariableInfo(shape, np.dtype(np.float32), (None,) * len(shape), is_buffer=False)


def test_coverage_counts_what_was_loaded_copied_and_ignored():
    table = Table(
        (Rule(source="w", target="weight", aliases=("tied",)), Rule(source="b", target="bias")),
        (Ignored(r"x\.\d", "they are drawn anew"), Ignored("mask", "it is computed")),
    )
    names = ("w", "tied", "b", "x.0", "x.1", "mask")
    source = memory_source({name: np.ones(2, np.float32) for name in names})
    found = coverage(source, table, {"weight": info(2), "bias": info(2)})
    assert (found.loaded, found.total, found.copies) == (2, 6, ("w",))
    assert found.lines() == [
        "loaded: 2 of 6 tensors",
        "equal copies: 1 (w)",
        "ignored: 1 (mask): it is computed",
        "ignored: 2 (x.0, x.1): they are drawn anew",
    ]


@pytest.mark.parametrize(
    ("error", "rounded_to", "is_small"),
    [
        (0.0, None, True),
        (1e-6, None, True),  # another order of sums
        (1e-4, None, False),
        (1e-2, "bfloat16", True),
        (1e-2, "float16", True),
        (5e-2, "float16", False),
        (1.0, "bfloat16", False),
    ],
)
def test_outputs_may_differ_by_the_rounding_of_the_dtype(error, rounded_to, is_small):
    expected = {"a": np.full(9, 2.0, np.float32), "b": np.full(3, 1e4, np.float32)}
    found = {"a": expected["a"] * (1 + error), "b": expected["b"]}
    assert compare(expected, found, rounded_to).is_small == is_small


def test_values_that_are_not_finite_are_never_small():
    difference = compare({"a": np.ones(2)}, {"a": np.array([1.0, np.nan])}, "bfloat16")
    assert not difference.is_small and difference.summary() == "not finite: a"


def test_a_conversion_prints_coverage_dtypes_and_the_self_test(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(SALM)
    assert main(["qwen3_lora_hf", str(tmp_path / "out"), "--merge-lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loaded: 128 of 128 tensors"
    assert "120 tensors, 318096 bytes (118 float32, 2 int64)" in lines[1]
    assert lines[2].startswith("self-test: finite outputs, relative difference")
    assert len(lines) == 3


def test_ignored_and_suspect_tensors_are_named(tmp_path, capsys):
    weights = tensors(open_weights(LLAMA))
    zero = "model.layers.0.input_layernorm.weight"
    weights |= {
        zero: np.zeros_like(weights[zero]),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    write_safetensors(tmp_path / "llm/model.safetensors", weights)
    os.link(LLAMA / "config.json", tmp_path / "llm/config.json")
    assert main([str(tmp_path / "llm"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"loaded: {len(weights)} of {len(weights)} tensors" in printed
    assert f"look at {zero}: all zeros" in printed
    assert "reads back as it was written" in printed and "finite outputs" in printed


def test_a_failed_self_test_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    probe = export._probe_llm_directory

    def damaged(directory: Path):
        outputs = probe(directory)
        return outputs if directory == LLAMA else {n: x + 1 for n, x in outputs.items()}

    monkeypatch.setattr(export, "_probe_llm_directory", damaged)
    arguments = [str(LLAMA), str(tmp_path / "out"), "--to", "hf"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "does not compute what its source" in captured.err
    assert main([*arguments[:1], str(tmp_path / "unchecked"), "--no-self-test"]) == 0
    assert "self-test" not in capsys.readouterr().out


def test_an_llm_of_an_unknown_family_is_written_and_not_run(tmp_path, capsys):
    folder = tmp_path / "llm"
    write_safetensors(folder / "model.safetensors", {"w": np.arange(3.0, dtype=np.float32)})
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert "the LLM was not run" in capsys.readouterr().out


@pytest.mark.slow  # compiles a codec and a speech decoder
@pytest.mark.parametrize("name", ["duplex_s2s", "duplex_s2s_speech_decoder"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_duplex_models_pass_the_self_test(name, dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(DATA / "duplex")
    options = [] if dtype is None else ["--dtype", dtype]
    assert main([str(hf(name)), str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "ignored: 6" in printed and "finite outputs" in printed
