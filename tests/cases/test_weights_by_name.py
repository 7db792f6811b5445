"""What holds no weights that can be read is refused by its right name, at every reader."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import convert
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers import (
    memory_source,
    open_weights,
    read_json,
    read_nemo,
    write_safetensors,
)
from speechlm2_jax.conversion.readers.torch_files import read_hyper_parameters
from speechlm2_jax.models import SALM, ASRModel, AudioCodec
from speechlm2_jax.settings import SettingsError
from tests.cases.test_tied_llm import CONFIG, INFOS, stored

LLM = Path(__file__).parents[1] / "data/llm/qwen3"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3087467144\n"
CONTENTS = {
    LFS: "Git LFS pointer.*git lfs pull",
    b"": "empty",
    b"\n  <!DOCTYPE html>\n<html><body>404</body></html>": "web page",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "web page",
    b"Entry not found": "error message",
    b'{"error":"Repository not found"}': "error message",
    b"GGUF\x03\0\0\0": "GGUF",
    b"\x89HDF\r\n\x1a\n....": "Keras",
}
READERS = {
    "model.safetensors": open_weights,
    "model.bin": open_weights,
    "model.ckpt": read_hyper_parameters,
    "model.pt": open_weights,
    "model.nemo": read_nemo,
    "config.json": read_json,
    "model.safetensors.index.json": open_weights,
    "asr.nemo": lambda path: ASRModel.from_pretrained(str(path)),
    "codec.nemo": lambda path: AudioCodec.from_pretrained(str(path)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", CONTENTS, ids=lambda c: c[:12].decode("latin-1"))
def test_files_that_are_something_else_are_named_by_every_reader(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConversionError, SettingsError), match=CONTENTS[content]) as raised:
        READERS[name](tmp_path / name)
    assert name in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_convert_refuses_it_in_one_line(tmp_path, capsys, name):
    shutil.copytree(LLM, tmp_path / "llm")
    (tmp_path / "llm" / name).write_bytes(LFS)
    assert convert.main([str(tmp_path / "llm"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Git LFS pointer" in error and error.count("\n") == 1


FOLDERS = {
    "adapter_config.json": "PEFT adapter",
    "adapter_model.safetensors": "PEFT adapter",
    ".metadata": "torch distributed",
    "__0_0.distcp": "torch distributed",
    "weights/.metadata": "torch distributed",
    "zero_to_fp32.py": "DeepSpeed",
    "_METADATA": "Orbax",
    "consolidated.00.pth": "maker's own format",
    "tf_model.h5": "another framework",
    "flax_model.msgpack": "another framework",
    "weights.npz": "another framework",
    "model-00001-of-00002.safetensors": "without their index",
    "weights.safetensors": "another name",
}


def salm(directory: Path) -> SALM:
    return SALM(
        {
            "pretrained_llm": str(directory),
            "pretrained_asr": str(LLM.parents[1] / "salm/asr.nemo"),
            "prompt_format": "qwen",
            "audio_locator_tag": "<|audioplaceholder|>",
            "perception": {"modality_adapter": {"_target_": "x.IdentityConnector", "d_model": 32}},
        }
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_without_weights_are_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConversionError, match=FOLDERS[name]):
        open_weights(tmp_path)
    for opened in (salm, SALM.from_pretrained):
        named = f"config.json is missing.*{FOLDERS[name]}|{FOLDERS[name]}.*without a configuration"
        with pytest.raises(SettingsError, match=named):
            opened(tmp_path)


def test_an_adapter_beside_weights_is_not_passed_over(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="merge"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.ggml", "model.h5", "__0_0.distcp", "w.npz", "m.onnx"])
def test_files_of_other_tools_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConversionError, match="not supported|name its folder"):
        open_weights(tmp_path / name)


def test_safetensors_under_another_suffix_is_named(tmp_path):
    write_safetensors(tmp_path / "model.bin", {"a": np.zeros(2, np.float32)})
    with pytest.raises(ConversionError, match="safetensors file"):
        open_weights(tmp_path / "model.bin")


QUANTISED = {
    "GPTQ, 4 bits": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "AWQ, 4 bits": {"quantization_config": {"quant_method": "awq", "w_bit": 4}},
    "bitsandbytes, 4 bits": {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    },
    "FP8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "modelopt": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    "MLX, 4 bits": {"quantization": {"group_size": 64, "bits": 4}},
    "does not name": {"quantization_config": {"odd": True}},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_refused_by_their_method(method):
    plain = json.loads((LLM / "config.json").read_text())
    with pytest.raises(ConversionError, match=f"quantised by .*{method}.*original model"):
        decoder_config(plain | QUANTISED[method])


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "FP8"),
        ("weight_scale", "FP8"),
        ("scales", "MLX"),
        ("lora_A.weight", "LoRA"),
    ],
)
def test_quantised_weights_are_told_by_their_names_too(suffix, what):
    weights = stored()
    whole = weights.pop("model.layers.0.self_attn.q_proj.weight")
    kept = {} if suffix in ("qweight", "weight_packed") else {"weight": whole}
    for end in (suffix, *kept):
        weights[f"model.layers.0.self_attn.q_proj.{end}"] = kept.get(end, np.zeros(4, np.int32))
    with pytest.raises(ConversionError, match=what):
        mapping.load(memory_source(weights), decoder_table(CONFIG), INFOS)
