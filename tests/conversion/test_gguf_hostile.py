"""GGUF files with numbers that no file needs, and models that are not supported: one line each."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.gguf import open_gguf
from speechlm2_jax.conversion.readers import open_weights, read_gguf
from speechlm2_jax.conversion.readers.gguf import MAX_VALUES
from speechlm2_jax.conversion.readers.gguf_blocks import OTHER_TYPES
from tests.conversion.gguf_files import Stored, entry, header, minimal, text, write_gguf

HUGE = 2**62


def key(name: str, kind: int, content: bytes = b"") -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def keys(*entries: bytes, count: int | None = None) -> bytes:
    number = len(entries) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, 0, number) + b"".join(entries)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def table(*entries: bytes, count: int | None = None, data: int = 64, **metadata: Any) -> bytes:
    """A file of these entries of the table, and `data` bytes of tensors."""
    named = {name.replace("__", "."): value for name, value in metadata.items()}
    start = header(named, len(entries) if count is None else count) + b"".join(entries)
    return start + bytes(-len(start) % 32) + bytes(data)


FILES = {
    "nothing": b"GGUF",
    "another beginning": b"GGUX" + bytes(60),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^62 keys": keys(count=HUGE),
    "65,000 keys": keys(count=65_000),
    "2^62 tensors": table(count=HUGE),
    "more tensors than entries": table(count=9),
    "a name of 2^63 bytes": keys(struct.pack("<Q", 2**63)),
    "a name of 2 KiB": keys(key("a" * 2048, 4, bytes(4))),
    "a text beyond the file": keys(key("a", 8, struct.pack("<Q", 1000))),
    "not UTF-8": keys(key("a", 8, text(b"\xff\xfe"))),
    "a key twice": keys(key("a", 4, bytes(4)), key("a", 4, bytes(4))),
    "an unknown type": keys(key("a", 77, bytes(8))),
    "a list of an unknown type": keys(key("a", 9, array(77, 1, bytes(8)))),
    "a list of lists": keys(key("a", 9, array(9, 1, array(4, 1, bytes(4))))),
    "a list of 2^62 bytes": keys(key("a", 9, array(0, HUGE))),
    "a list of 2^62 texts": keys(key("a", 9, array(8, HUGE))),
    "too many values": keys(key("a", 9, array(0, MAX_VALUES + 1))),
    "a list beyond the file": keys(key("a", 9, array(4, 1000))),
    "a tensor twice": table(entry("a", (4,), 0, 0), entry("a", (4,), 0, 32)),
    "no axes": table(entry("a", (), 0, 0)),
    "nine axes": table(entry("a", (1,) * 9, 0, 0)),
    "2^32 axes": table(text("a") + struct.pack("<I", 2**32 - 1)),
    "an empty tensor": table(entry("a", (4, 0), 0, 0)),
    "2^62 elements": table(entry("a", (HUGE,), 0, 0)),
    "2^62 squared": table(entry("a", (HUGE, HUGE, HUGE), 2, 0)),
    "half a block": table(entry("a", (48,), 2, 0)),
    "beyond the file": table(entry("a", (1000,), 0, 0)),
    "far beyond the file": table(entry("a", (4,), 0, 2**63)),
    "overlapping": table(entry("a", (16,), 0, 0), entry("b", (4,), 0, 32)),
    "at an odd place": table(entry("a", (4,), 0, 4)),
    "an alignment of 0": table(entry("a", (4,), 0, 0), general__alignment=0),
    "an alignment of 2^31": table(entry("a", (4,), 0, 0), general__alignment=2**31),
    "an alignment that is text": table(entry("a", (4,), 0, 0), general__alignment="32"),
    "an unknown block": table(entry("a", (32,), 1234, 0)),
}


@pytest.mark.parametrize("name", FILES)
def test_headers_with_absurd_numbers_are_one_line(tmp_path, name):
    path = tmp_path / "m.gguf"
    path.write_bytes(FILES[name])
    with pytest.raises(ConversionError, match=r"m\.gguf") as raised:
        open_weights(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("number", OTHER_TYPES)
def test_other_blocks_are_refused_by_name(tmp_path, number):
    path = tmp_path / "m.gguf"
    path.write_bytes(table(entry("blk.0.w", (256,), number, 0)))
    with pytest.raises(ConversionError, match=rf"blk\.0\.w.* as {OTHER_TYPES[number]}, .*Q4_K"):
        open_weights(path)


def test_a_file_whose_bytes_changed_gives_an_error_or_a_model(tmp_path):
    metadata, tensors = minimal()
    whole = write_gguf(tmp_path / "m.gguf", metadata, tensors).read_bytes()
    beginning = len(whole) - sum(-(-t.nbytes // 32) * 32 for t in tensors.values())
    draw, path, refused = np.random.default_rng(0), tmp_path / "x.gguf", 0
    for _ in range(300):
        content = bytearray(whole)
        for place in draw.integers(0, beginning, draw.integers(1, 4)):
            content[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.integers(256)])
        path.write_bytes(bytes(content[: draw.choice([len(whole), draw.integers(1, len(whole))])]))
        try:
            model = open_gguf(path)
            model.tokenizer_files()
            for name in model.weights.infos:
                model.weights.read(name)
        except ConversionError:
            refused += 1
    assert 150 < refused < 300


def test_infinite_scales_are_numbers(tmp_path):
    blocks = np.zeros((1, 18), np.uint8)
    blocks[:, :2] = np.array([np.inf], np.float16).view(np.uint8)
    blocks[:, 2] = 0x98
    path = write_gguf(tmp_path / "m.gguf", {}, {"w": Stored(2, (1, 32), blocks.tobytes())})
    values = open_weights(path).read("w")
    assert np.isnan(values[0, 0]) and values[0, 16] == np.inf and values[0, 1] == -np.inf


MODELS = {
    # what changes of the smallest Llama -> the error
    "another architecture": ({"general.architecture": "mamba"}, "'mamba'.*llama, qwen2, qwen3"),
    "no architecture": ({"general.architecture": 3}, "'3'"),
    "an adapter": ({"general.type": "adapter"}, "'adapter', not a model"),
    "a part of a file": ({"split.count": 3}, "3 parts.*--merge"),
    "older blocks": ({"general.quantization_version": 1}, "quantization_version.*2 is supported"),
    "no sizes": ({"llama.block_count": None}, r"llama\.block_count is missing"),
    "a size of 0": ({"llama.embedding_length": 0}, "embedding_length=0"),
    "a size that is text": ({"llama.embedding_length": "8"}, "embedding_length='8'"),
    "2^30 layers": ({"llama.block_count": 2**30}, "block_count=1073741824"),
    "layers that differ": ({"llama.feed_forward_length": [6, 7]}, r"feed_forward_length=\[6, 7\]"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "epsilon=0.0"),
    "infinite base": ({"llama.rope.freq_base": float("inf")}, "freq_base=inf"),
    "experts": ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "expert_count=8"),
    "an unknown key": ({"llama.attention.novelty": 1}, r"llama\.attention\.novelty=1"),
    "a window": ({"llama.attention.sliding_window": 16}, "sliding_window"),
    "heads that do not divide": ({"llama.attention.head_count_kv": 3}, "does not divide"),
    "half of a head rotates": ({"llama.rope.dimension_count": 2}, "dimension_count=2.*4 wide"),
    "other values": ({"llama.attention.value_length": 8}, "value_length=8"),
    "another vocabulary": ({"llama.vocab_size": 5}, "vocab_size is not the height"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    "yarn without a length": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        "yarn with its original_context_length",
    ),
    "yarn with another factor": ({"llama.rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor"),
    "more layers": ({"llama.block_count": 2}, r"lacks tensors.*blk\.1\."),
    "another inner width": ({"llama.feed_forward_length": 7}, r"ffn_down\.weight \[8, 6\]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_supported_are_one_line(tmp_path, name):
    changes, match = MODELS[name]
    metadata, tensors = minimal()
    metadata = {k: v for k, v in (metadata | changes).items() if v is not None}
    with pytest.raises(ConversionError, match=rf"m\.gguf.*{match}"):
        open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors))


TENSORS = {
    "no embedding": ({"token_embd.weight": None}, "token_embd.weight is missing"),
    "one too many": ({"blk.0.attn_sinks.weight": np.ones(2, np.float32)}, "attn_sinks"),
    "one too few": ({"blk.0.attn_k.weight": None}, r"lacks tensors: blk\.0\.attn_k\.weight"),
    "a bias too few": ({"blk.0.attn_q.bias": np.ones(8, np.float32)}, r"lacks.*attn_k\.bias"),
    "a head of another height": ({"output.weight": np.ones((5, 8), np.float32)}, r"\[5, 8\]"),
    "divisors too few": ({"rope_freqs.weight": np.ones(3, np.float32)}, r"rope_freqs.* \[3\]"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_one_line(tmp_path, name):
    changes, match = TENSORS[name]
    metadata, tensors = minimal()
    tensors = {k: v for k, v in (tensors | changes).items() if v is not None}
    with pytest.raises(ConversionError, match=rf"m\.gguf.*{match}"):
        open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors))


def test_neutral_keys_are_accepted(tmp_path):
    metadata, tensors = minimal()
    metadata |= {
        "llama.expert_count": 0,
        "llama.attention.sliding_window": 64,  # as long as the context
        "llama.rope.scaling.type": "none",
        "llama.attention.causal": True,
        "general.name": "x",
    }
    assert (
        "rope_scaling" not in open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors)).config
    )


def test_the_smallest_file_opens_and_a_hole_between_tensors_is_no_error(tmp_path):
    path: Path = tmp_path / "m.gguf"
    path.write_bytes(table(entry("b", (4,), 0, 32), entry("a", (4,), 0, 0)))
    assert read_gguf(path).weights.read("b").tolist() == [0.0] * 4
    path.write_bytes(table(entry("a", (4,), 0, 32)))
    assert list(open_weights(path).infos) == ["a"]
    with pytest.raises(UnsafeFileError, match="overlaps"):
        path.write_bytes(FILES["overlapping"])
        open_weights(path)
