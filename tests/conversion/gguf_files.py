"""Writes GGUF files as llama.cpp's tools do: the format, and what its converter changes."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from speechlm2_jax.conversion.readers import open_weights

UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
PLAIN = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 30}


class Signed(list[int]):
    """A list that is stored as int32; other lists of whole numbers are uint32."""


class Stored(NamedTuple):
    """A tensor as its bytes: ggml's number of the type, shape, rows of blocks."""

    number: int
    shape: tuple[int, ...]
    content: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> tuple[int, bytes]:
    """ggml's number of the type of a value, and its bytes."""
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (
            (UINT32, struct.pack("<I", value)) if value >= 0 else (INT32, struct.pack("<i", value))
        )
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, str | bytes):
        return TEXT, text(value)
    inner = [typed(element) for element in value]
    kind = inner[0][0] if inner else TEXT
    if isinstance(value, Signed):
        kind, inner = INT32, [(INT32, struct.pack("<i", element)) for element in value]
    return ARRAY, struct.pack("<IQ", kind, len(inner)) + b"".join(raw for _, raw in inner)


def entry(name: str, sizes: tuple[int, ...], number: int, start: int) -> bytes:
    """One line of the table of tensors; `sizes` are in the file's order, fastest first."""
    axes = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + axes + struct.pack("<IQ", number, start)


def header(metadata: dict[str, Any], count: int, *, version: int = 3) -> bytes:
    """Everything before the table of tensors."""
    keys = [text(key) + struct.pack("<I", kind) + raw
            for key, (kind, raw) in ((k, typed(v)) for k, v in metadata.items())]  # fmt: skip
    return b"GGUF" + struct.pack("<IQQ", version, count, len(keys)) + b"".join(keys)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Writes a file; tensors are arrays or `Stored`."""
    alignment = metadata.get("general.alignment", 32)
    table, data = b"", b""
    for name, value in tensors.items():
        if not isinstance(value, Stored):
            value = Stored(PLAIN[value.dtype], value.shape, value.tobytes())
        table += entry(name, value.shape[::-1], value.number, len(data))
        data += value.content + bytes(-len(value.content) % alignment)
    beginning = header(metadata, len(tensors)) + table
    path.write_bytes(beginning + bytes(-len(beginning) % alignment) + data)
    return path


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def llama_cpp_name(name: str, architecture: str) -> str:
    """llama.cpp's name of one of Hugging Face's tensors."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, *inner, end = name.split(".")
    module = ".".join(inner)
    if module == "post_attention_layernorm":
        own = "post_attention_norm" if architecture in ("gemma2", "gemma3") else "ffn_norm"
        return f"blk.{layer}.{own}.{end}"
    return f"blk.{layer}.{NAMES[module]}.{end}"


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's converter gives queries and keys of Llama."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def stored_tensors(directory: Path, config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The tensors of a directory as llama.cpp's converter writes them."""
    source, made = open_weights(directory), {}
    for name in source.infos:
        value = source.read(name)
        if architecture == "llama" and ".q_proj." in name:
            value = permuted(value, config["num_attention_heads"])
        elif architecture == "llama" and ".k_proj." in name:
            value = permuted(value, config["num_key_value_heads"])
        elif architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        made[llama_cpp_name(name, architecture)] = value
    return made


def keys_of(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a config.json."""
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
    }
    if "head_dim" in config:
        keys |= {f"attention.{name}_length": config["head_dim"] for name in ("key", "value")}
    if architecture == "llama":
        keys |= {"vocab_size": config["vocab_size"], "rope.dimension_count": config["head_dim"]}
    if architecture in ("gemma2", "gemma3"):
        keys["attention.sliding_window"] = config["sliding_window"]
        keys["attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config["layer_types"]
        ]
    if architecture == "gemma2":
        keys["attn_logit_softcapping"] = config["attn_logit_softcapping"]
        keys["final_logit_softcapping"] = config["final_logit_softcapping"]
    named = {f"{architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": architecture, "general.type": "model"} | named


def byte_level_keys(directory: Path, pre: str) -> dict[str, Any]:
    """The keys of the tokenizer of a directory, which must be byte-level BPE."""
    spec = json.loads((directory / "tokenizer.json").read_text())
    added = {token["id"]: token for token in spec["added_tokens"]}
    ids = {index: token for token, index in spec["model"]["vocab"].items()}
    ids |= {index: token["content"] for index, token in added.items()}
    kinds = [
        3 if i in added and added[i]["special"] else 4 if i in added else 1 for i in range(len(ids))
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [ids[i] for i in range(len(ids))],
        "tokenizer.ggml.token_type": Signed(kinds),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
    }


MINIMAL_TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
    "tokenizer.ggml.token_type": Signed([1, 1, 1, 3]),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


def minimal() -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors of the smallest Llama: one layer, two heads of four elements."""
    config = {
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "head_dim": 4,
        "vocab_size": 4,
        "rope_parameters": {"rope_theta": 10000.0},
    }
    shapes = {
        "token_embd": (4, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (6, 8),
        "blk.0.ffn_up": (6, 8),
        "blk.0.ffn_down": (8, 6),
    }
    draw = np.random.default_rng(0)
    tensors = {f"{n}.weight": draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return keys_of(config, "llama") | MINIMAL_TOKENS, tensors
