"""Weight files and configurations with numbers that no file needs: read, or one line."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import open_weights, read_json, write_safetensors
from speechlm2_jax.conversion.readers.yaml_text import read_yaml
from speechlm2_jax.pretrained.locate import read_config_json
from speechlm2_jax.settings import SettingsError, load, override, parse_json

FLOAT8 = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)


def write(path: Path, header: bytes | dict, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(shape, start=0, stop=4, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "empty and 2^62": {"a": entry([0, 2**62], 0, 0)},
    "2^62 squared": {"a": entry([2**62, 2**62])},
    "negative": {"a": entry([-1])},
    "10,000 digits": b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"1" * 10000),
    "overlapping": {"a": entry([1]), "b": entry([1])},
    "hole": {"a": entry([1]), "b": entry([1], 8, 12)},
    "beyond the file": {"a": entry([100], 0, 400)},
    "backwards": {"a": entry([1], 4, 0)},
    "twice": b'{"a":%s,"a":%s}' % ((json.dumps(entry([1])).encode(),) * 2),
    "deep": b"[" * 100_000,
    "no dtype": {"a": entry([1], dtype="F128")},
    "packed floats": {"a": entry([8], dtype="F4")},
    "rank 40": {"a": entry([1] * 40)},
    "float shape": {"a": entry([1.5])},
    "not an object": b"[1, 2]",
    "not JSON": b"{{{{{{{{",
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_with_absurd_numbers_are_one_line(tmp_path, name):
    path = write(tmp_path / "model.safetensors", HEADERS[name], b"\0" * 4)
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        open_weights(path)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length_is_one_line(tmp_path, size):
    path = write(tmp_path / "model.safetensors", b"{}", size=size)
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        open_weights(path)


def test_torch_shapes_that_no_tensor_has_are_one_line(tmp_path):
    whole = torch.zeros(4)
    torch.save({"a": whole.as_strided((0, 2**50), (1, 1))}, tmp_path / "model.bin")
    with pytest.raises(ConversionError, match="no tensor has"):
        open_weights(tmp_path / "model.bin")


def test_empty_tensors_are_read_whole_and_by_parts(tmp_path):
    write_safetensors(
        tmp_path / "model.safetensors",
        {"a": np.zeros((0, 4), np.float32), "b": np.ones((3, 4), np.float32)},
    )
    source = open_weights(tmp_path)
    assert source.read("a").shape == (0, 4)
    assert source.read("a", (slice(0, 9), slice(1, 3))).shape == (0, 2)
    assert source.read("b", (slice(2, 2), slice(0, 4))).shape == (0, 4)
    assert source.read("b", (slice(2, 99), slice(None))).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_floats_of_eight_bits_are_the_numbers_that_torch_wrote(tmp_path, name, dtype):
    numbers = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    tensors = {"w": numbers.to(getattr(torch, dtype)), "b": torch.ones(1)}
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(tensors, tmp_path / name)
    source = open_weights(tmp_path / name)
    assert source.infos["w"].dtype == np.dtype(getattr(ml_dtypes, dtype))
    np.testing.assert_array_equal(source.read("w").astype(np.float32), numbers.numpy())
    part = source.read("w", (slice(1, 2), slice(0, 9)))
    np.testing.assert_array_equal(part.astype(np.float32), [[0.5, 4.0]])
    write_safetensors(tmp_path / "copy" / "model.safetensors", {"w": source.read("w")})
    assert open_weights(tmp_path / "copy").read("w").tobytes() == source.read("w").tobytes()


def test_packed_floats_are_refused_with_tensor_and_dtype(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": entry([8], dtype="F4")}, b"\0" * 4)
    with pytest.raises(ConversionError, match="w has dtype F4"):
        open_weights(path)


TEXTS = {
    "digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "brackets": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not text": b'{"a": "\xff\xfe\xfa"}',
    "cut short": b'{"a": 1',
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_json_reader_refuses_in_one_line(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_bytes(TEXTS[name])
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_json(path)
    with pytest.raises(SettingsError, match=r"model\.pretrained_llm: .*config\.json is not JSON"):
        read_config_json(path, key="model.pretrained_llm")
    with pytest.raises(SettingsError, match="not JSON"):
        parse_json(TEXTS[name])


def test_a_byte_order_mark_and_a_huge_float_are_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1e999}')
    assert read_json(path) == read_config_json(path, key="x") == {"a": float("inf")}


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "9" * 10_000,
        "a: 0x" + "f" * 10 + "\nb: " + "[" * 1500,
        "a: !!int ''",
        "a: !!float x",
        "a: !!bool maybe",
        "a: !!timestamp soon",
    ],
    ids=["digits", "deep", "empty int", "no float", "no bool", "no time"],
)
def test_every_yaml_reader_refuses_in_one_line(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load(path)
    with pytest.raises(ConversionError, match="model_config"):
        read_yaml(text.encode(), "model_config.yaml")


def test_an_override_of_ten_thousand_digits_is_one_line():
    with pytest.raises(SettingsError, match="digits"):
        override({"a": 1}, ["a=" + "9" * 10_000])
