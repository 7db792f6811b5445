"""GGUF files become directories of Hugging Face, tensor for tensor; others are refused."""

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import main
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf import open_gguf, write_directory
from speechlm2_jax.conversion.gguf.rotary import find_llama3
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.mapping import check
from speechlm2_jax.conversion.readers import open_weights, read_gguf
from speechlm2_jax.conversion.readers.gguf_blocks import BLOCK_TYPES, ELEMENTS_AT_ONCE, expand
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.llm.decoder import Decoder
from tests.conversion.gguf_files import (
    Stored,
    byte_level_keys,
    keys_of,
    minimal,
    stored_tensors,
    write_gguf,
)

DATA = Path(__file__).parents[1] / "data"
LLM = DATA / "llm"
GOLDEN = load_file(DATA / "conversion/gguf_blocks.safetensors")
BY_NAME = {kind.name: (number, kind) for number, kind in BLOCK_TYPES.items()}
QUANTISED = sorted({name.partition(".")[0] for name in GOLDEN})
ARCHITECTURES = {
    "llama": "llama",
    "llama3": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}


@pytest.mark.parametrize("name", QUANTISED)
def test_blocks_are_the_numbers_of_llama_cpps_package(name, tmp_path):
    number, kind = BY_NAME[name]
    blocks, values = GOLDEN[f"{name}.blocks"], GOLDEN[f"{name}.values"]
    np.testing.assert_array_equal(expand(kind, blocks), values)
    stored = {"w": Stored(number, values.shape, blocks.tobytes())}
    source = read_gguf(write_gguf(tmp_path / "m.gguf", {}, stored)).weights
    assert source.infos["w"].shape == values.shape
    np.testing.assert_array_equal(source.read("w"), values)
    for index in ((slice(1, 3), slice(None)), (slice(0, 2), slice(5, 40)), (slice(2, 2), slice(9))):
        np.testing.assert_array_equal(source.read("w", index), values[index])


def test_every_block_type_that_is_quantised_is_compared():
    assert {name for name, (_, kind) in BY_NAME.items() if kind.expand is not None} == {*QUANTISED}


def test_long_tensors_are_expanded_piece_by_piece():
    kind = BY_NAME["Q8_0"][1]
    rows = GOLDEN["Q8_0.blocks"]
    many = np.tile(rows, (2 * ELEMENTS_AT_ONCE // rows.size + 1, 1))
    expected = np.tile(GOLDEN["Q8_0.values"], (len(many) // len(rows), 1))
    np.testing.assert_array_equal(expand(kind, many), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_numbers_keep_their_dtype(dtype, tmp_path):
    tensors = {"a": np.arange(12).reshape(3, 4).astype(dtype), "b": np.ones(5, dtype)}
    path = write_gguf(tmp_path / "m.gguf", {"general.alignment": 64}, tensors)
    source = open_weights(path)
    for name, value in tensors.items():
        assert source.read(name).dtype == dtype
        np.testing.assert_array_equal(source.read(name), value)
    part = (slice(1, 3), slice(2, 4))
    np.testing.assert_array_equal(source.read("a", part), tensors["a"][part])


def llm_file(name: str, path: Path, **changes) -> dict:
    """Writes the model of a directory of test data as a GGUF file; its config.json."""
    config = json.loads((LLM / name / "config.json").read_text())
    del config["initializer_range"]  # which a file does not tell, as the next
    if "query_pre_attn_scalar" in config:
        config["query_pre_attn_scalar"] = config["head_dim"]
    architecture = ARCHITECTURES[name]
    tensors = stored_tensors(LLM / name, config, architecture)
    if config["rope_parameters"].get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_divisors(config)
    write_gguf(path, keys_of(config, architecture) | changes, tensors)
    return config


def llama3_divisors(config: dict) -> np.ndarray:
    """What llama.cpp's converter computes, frequency by frequency."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        is_short, is_long = wavelength < length / high, wavelength > length / low
        divisors.append(1.0 if is_short else factor if is_long else between)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_what_llama_cpps_converter_was_given(name, tmp_path):
    config = llm_file(name, tmp_path / "m.gguf")
    model, original = open_gguf(tmp_path / "m.gguf"), open_weights(LLM / name)
    assert model.weights.infos.keys() == original.infos.keys()
    for tensor in original.infos:
        value = original.read(tensor)
        if name.startswith("gemma") and tensor.endswith("norm.weight"):
            value = (value + np.float32(1)) - np.float32(1)
        np.testing.assert_array_equal(model.weights.read(tensor), value, err_msg=tensor)
    made, expected = decoder_config(model.config), decoder_config(config)
    if name == "llama3":  # several settings give its four frequencies
        frequencies = [c.rope.frequencies(c.head_width) for c in (made, expected)]
        np.testing.assert_array_equal(*frequencies)
        made = replace(made, rope=expected.rope)
    assert made == expected


def test_parts_of_permuted_tensors_are_parts_of_the_whole(tmp_path):
    llm_file("llama", tmp_path / "m.gguf")
    source, name = open_gguf(tmp_path / "m.gguf").weights, "model.layers.1.self_attn.q_proj.weight"
    part = (slice(3, 9), slice(2, 7))
    np.testing.assert_array_equal(source.read(name, part), source.read(name)[part])


def test_a_quantised_model_becomes_a_directory_that_loads(tmp_path, capsys):
    keys, tensors = minimal()
    number, kind = BY_NAME["Q8_0"]
    draw = np.random.default_rng(1)
    keys |= {"llama.embedding_length": 32, "llama.rope.dimension_count": 16}
    keys |= {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (6, 32), "ffn_up": (6, 32)}
    for name in tensors:
        module = name.split(".")[-2]
        if module in shapes or module == "token_embd":
            shape = shapes.get(module, (4, 32))
            blocks = draw.integers(0, 256, (shape[0], 34), np.uint8)
            blocks[:, :2] = np.full(shape[0], 0.01, np.float16)[:, None].view(np.uint8)
            tensors[name] = Stored(number, shape, blocks.tobytes())
        elif module == "ffn_down":
            tensors[name] = np.ones((32, 6), np.float16)
        else:
            tensors[name] = np.ones(32, np.float32)
    (tmp_path / "in").mkdir()
    path = write_gguf(tmp_path / "in/m.gguf", keys, tensors)
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "11 tensors" in capsys.readouterr().out
    written, model = open_weights(tmp_path / "out"), open_gguf(path)
    for name in model.weights.infos:
        assert written.read(name).tobytes() == model.weights.read(name).tobytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["tie_word_embeddings"]
    decoder = decoder_config(config)
    infos = describe(abstract(lambda rngs: Decoder(decoder, rngs=rngs)))
    check(written, decoder_table(decoder), infos)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"eos_token_id": [3]}
    assert main([str(path), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = open_weights(tmp_path / "half")
    assert {info.dtype for info in half.infos.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_tokenizer_is_the_directorys(tmp_path):
    from speechlm2_jax.data.tokenizer import Tokenizer

    tokens = byte_level_keys(LLM / "qwen3", "qwen2")
    llm_file("qwen3", tmp_path / "m.gguf", **tokens, **{"tokenizer.ggml.eos_token_id": 332})
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 0
    made, original = Tokenizer(tmp_path / "out"), Tokenizer(LLM / "qwen3")
    for text in ("Hello, the  world's 123\n\n", "e\u0301t\u00e9 \U0001f600", " <|im_end|>x"):
        assert made.text_to_ids(text) == original.text_to_ids(text)
        assert made.ids_to_text(made.text_to_ids(text)) == original.ids_to_text(
            original.text_to_ids(text)
        )
    assert made.eos_id == 332


def test_inspect_lists_a_file_by_llama_cpps_names(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", *minimal())
    assert main([str(tmp_path / "m.gguf"), "--inspect"]) == 0
    assert "blk.0.attn_k.weight" in capsys.readouterr().out


def test_a_directory_with_several_files_names_none(tmp_path):
    write_gguf(tmp_path / "a.gguf", *minimal())
    assert len(open_weights(tmp_path).infos) == 11
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ConversionError, match="several GGUF files.*name one"):
        open_weights(tmp_path)


LLAMA3_SETTINGS = [
    # head width, theta, factor, low, high, length -> the same with low = 1
    ((64, 500000.0, 32.0, 1.0, 4.0, 8192), (32.0, 4.0, 8192)),
    ((128, 500000.0, 8.0, 1.0, 4.0, 8192), (8.0, 4.0, 8192)),
    ((128, 130000.0, 4.0, 1.0, 4.0, 2048), (4.0, 4.0, 2048)),
    ((128, 1000000.0, 16.0, 2.0, 5.0, 6000), (16.0, 2.5, 3000)),
]


@pytest.mark.parametrize(("given", "found"), LLAMA3_SETTINGS)
def test_llama3s_scaling_is_found_from_its_divisors(given, found):
    width, theta, factor, low, high, length = given
    rope = {"rope_theta": theta, "factor": factor, "low_freq_factor": low}
    rope |= {"high_freq_factor": high, "original_max_position_embeddings": length}
    divisors = llama3_divisors({"rope_parameters": rope, "head_dim": width})
    block = find_llama3(divisors.astype(np.float64), theta)
    assert block is not None and block["low_freq_factor"] == 1.0
    numbers = [block[k] for k in ("factor", "high_freq_factor", "original_max_position_embeddings")]
    assert numbers == list(found)


def test_other_divisors_are_refused(tmp_path):
    keys, tensors = minimal()
    for divisors in ([1.0, 3.0], [2.0, 1.0], [np.nan, 2.0], [0.0, 4.0], [1.0, np.inf]):
        tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
        keys["llama.rope.freq_base"] = 1e9
        path = write_gguf(tmp_path / "m.gguf", keys, tensors)
        if divisors == [1.0, 3.0]:  # any threshold between the two frequencies gives these
            assert open_gguf(path).config["rope_scaling"]["factor"] == 3.0
            continue
        with pytest.raises(ConversionError, match="rope_freqs"):
            open_gguf(path)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    keys, tensors = minimal()
    number, kind = BY_NAME["Q8_0"]
    keys |= {
        "llama.block_count": 4,
        "llama.feed_forward_length": 8192,
        "llama.embedding_length": 32,
    }
    keys |= {f"llama.attention.{name}_length": 16 for name in ("key", "value")}
    keys["llama.rope.dimension_count"] = 16
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (8192, 32), "ffn_up": (8192, 32), "ffn_down": (32, 8192)}
    stored = {"token_embd.weight": (4, 32), "output_norm.weight": (32,)}
    for layer in range(4):
        for name in (n.split(".")[2] for n in tensors if n.startswith("blk.0")):
            stored[f"blk.{layer}.{name}.weight"] = shapes.get(name, (32,))
    row = GOLDEN["Q8_0.blocks"].reshape(-1, kind.size_bytes)[0]
    blocks = {n: np.tile(row, (int(np.prod(s)) // 32, 1)).tobytes() for n, s in stored.items()}
    tensors = {name: Stored(number, shape, blocks[name]) for name, shape in stored.items()}
    path = write_gguf(tmp_path / "m.gguf", keys, tensors)
    largest = 8192 * 32 * 4
    tracemalloc.start()
    write_directory(path, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out/model.safetensors").stat().st_size > 12 * largest
    assert peak < 4 * largest
