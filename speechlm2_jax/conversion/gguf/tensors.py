# pyright: basic
"""Tensors of a GGUF file under Hugging Face's names, with llama.cpp's changes undone.

Rows of query and key of a `llama` file are in another order: llama.cpp rotates neighbours, Hugging
Face element i with i + H/2. Norms of Gemma are stored with 1 added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError, listed
from speechlm2_jax.conversion.gguf.config import EMBEDDING, HEAD, architecture_of
from speechlm2_jax.conversion.gguf.rotary import ROPE_FREQS
from speechlm2_jax.conversion.readers import GgufFile, Index, LazySource

Change = Callable[[np.ndarray], np.ndarray]
"""The whole tensor as stored -> as Hugging Face has it."""
Shape = tuple[int, ...]
ROTARY_ENDINGS = (".inv_freq", ".attn_rot_embd")
"""Frequencies that old files stored; computed here."""


@dataclass(frozen=True)
class Place:
    """One tensor of Hugging Face's: where it is in the file, and what is undone."""

    stored: str
    shape: Shape
    change: Change | None = None


def hugging_face_source(file: GgufFile, config: Mapping[str, Any]) -> LazySource:
    """The tensors that `config` (a config.json made of the file) asks for; none is read yet.

    Raises ConversionError for tensors that are missing, of another shape, or left over.
    """
    places = _places(file, config)
    infos = file.weights.infos
    missing = {p.stored for p in places.values() if p.stored not in infos}
    if missing:
        raise ConversionError(f"{file.path} lacks tensors: {listed(missing, infos)}")
    used = {place.stored for place in places.values()} | {ROPE_FREQS}
    rest = {n for n in infos if n not in used and not n.endswith(ROTARY_ENDINGS)}
    if rest:
        raise ConversionError(
            f"{file.path}: no layer of the model takes {listed(rest)}, so it would compute "
            "something else"
        )
    wrong = [
        f"{place.stored} {list(infos[place.stored].shape)} (expected {list(place.shape)})"
        for place in places.values()
        if infos[place.stored].shape != place.shape
    ]
    if wrong:
        raise ConversionError(f"{file.path}: tensors of another shape: {listed(wrong)}")

    def fetch(name: str, index: Index | None) -> np.ndarray:
        place = places[name]
        if place.change is None:
            return file.weights.read(place.stored, index)
        whole = place.change(file.weights.read(place.stored))
        return whole if index is None else np.ascontiguousarray(whole[index])

    known = {name: infos[place.stored] for name, place in places.items()}
    return LazySource(known, fetch, where=str(file.path))


def _places(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Place]:
    """Every tensor of the model, by Hugging Face's name."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    norm = _lowered if architecture_of(file).norms_are_raised else None
    places = {
        "model.embed_tokens.weight": Place(EMBEDDING, (vocabulary, width)),
        "model.norm.weight": Place("output_norm.weight", (width,), norm),
    }
    if not config["tie_word_embeddings"]:
        places["lm_head.weight"] = Place(HEAD, (vocabulary, width))
    layer = _layer(file, config)
    for number in range(config["num_hidden_layers"]):
        for name, place in layer.items():
            stored = f"blk.{number}.{place.stored}"
            places[f"model.layers.{number}.{name}"] = Place(stored, place.shape, place.change)
    return places


def _layer(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Place]:
    """The tensors of one layer, with names as they are inside it."""
    architecture = architecture_of(file)
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    norm = _lowered if architecture.norms_are_raised else None

    def rotated(count: int) -> Change | None:
        return _halves(count) if architecture.neighbours_rotate else None

    places: dict[str, Place] = {}

    def linear(name: str, stored: str, shape: Shape, has_bias: bool, change: Any = None) -> None:
        places[f"{name}.weight"] = Place(f"{stored}.weight", shape, change)
        if has_bias:
            places[f"{name}.bias"] = Place(f"{stored}.bias", shape[:1], change)

    bias = config.get("attention_bias", False)
    qkv_bias = bias or architecture.model_type == "qwen2"
    for name, number, change in (
        ("q", heads, rotated(heads)),
        ("k", kv_heads, rotated(kv_heads)),
        ("v", kv_heads, None),
    ):
        shape = (number * head, width)
        linear(f"self_attn.{name}_proj", f"attn_{name}", shape, qkv_bias, change)
    linear("self_attn.o_proj", "attn_output", (width, heads * head), bias)
    mlp_bias = config.get("mlp_bias", False)
    for name in ("gate", "up"):
        linear(f"mlp.{name}_proj", f"ffn_{name}", (inner, width), mlp_bias)
    linear("mlp.down_proj", "ffn_down", (width, inner), mlp_bias)
    for name, stored in NORMS[architecture.model_type].items():
        shape = (head,) if name.startswith("self_attn") else (width,)
        places[f"{name}.weight"] = Place(f"{stored}.weight", shape, norm)
    return places


_TWO = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_OF_HEADS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_FOUR = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NORMS: Mapping[str, Mapping[str, str]] = {
    "llama": _TWO,
    "qwen2": _TWO,
    "qwen3": _TWO | _OF_HEADS,
    "gemma": _TWO,
    "gemma2": _FOUR,
    "gemma3_text": _FOUR | _OF_HEADS,
}
"""model_type -> norms inside a layer -> their names in a GGUF file."""


def _lowered(values: np.ndarray) -> np.ndarray:
    """Subtracts the 1 that Gemma's norms are stored with, in float32."""
    return (values.astype(np.float32) - np.float32(1)).astype(values.dtype)


def _halves(heads: int) -> Change:
    """Rows [heads * H, ...]: neighbours that are pairs move to rows i and i + H/2 of their head."""

    def change(values: np.ndarray) -> np.ndarray:
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

    return change
