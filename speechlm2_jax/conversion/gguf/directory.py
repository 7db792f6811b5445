# pyright: basic
"""A GGUF file as a directory of Hugging Face: read in place, or written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from speechlm2_jax.conversion.casting import cast_source
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf.config import config_json
from speechlm2_jax.conversion.gguf.tensors import hugging_face_source
from speechlm2_jax.conversion.gguf.tokenizer import tokenizer_config, tokenizer_json
from speechlm2_jax.conversion.gguf.vocabulary import PREFIX, GgufVocabulary, read_vocabulary
from speechlm2_jax.conversion.hf_config import of_plain_weights
from speechlm2_jax.conversion.readers import GgufFile, LazySource, read_gguf
from speechlm2_jax.conversion.writers.files import replacing
from speechlm2_jax.conversion.writers.shards import write_shards

CONFIG, GENERATION = "config.json", "generation_config.json"
OF_QWEN2 = ("qwen2", "deepseek-r1-qwen")
TOKENIZER = MappingProxyType({"tokenizer.json": None, "tokenizer_config.json": 2})
"""Files of the tokenizer -> how far their JSON is indented."""


@dataclass(frozen=True)
class GgufModel:
    """An LLM in a GGUF file, as Hugging Face would have it. Nothing is written."""

    file: GgufFile
    config: Mapping[str, Any]
    """config.json."""
    weights: LazySource
    """Under Hugging Face's names; each tensor is expanded when it is read."""

    @cached_property
    def vocabulary(self) -> GgufVocabulary:
        """The tokens. Raises ConversionError as `read_vocabulary`."""
        vocabulary = read_vocabulary(self.file)
        if len(vocabulary.tokens) > self.config["vocab_size"]:
            raise ConversionError(
                f"{self.file.path} has {len(vocabulary.tokens)} tokens, but embeddings of "
                f"{self.config['vocab_size']}"
            )
        return vocabulary

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: the tokens that begin, end and pad a generation."""
        special = self.vocabulary.special
        fields = {"bos_token_id": special.get("bos"), "eos_token_id": self.vocabulary.ends or None}
        fields["pad_token_id"] = special.get("pad")
        return {key: value for key, value in fields.items() if value is not None}

    def tokenizer_files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json. Raises ConversionError as they are made."""
        longest = self.config["max_position_embeddings"]
        contents = (tokenizer_json(self.vocabulary), tokenizer_config(self.vocabulary, longest))
        return {
            name: json.dumps(content, ensure_ascii=False, indent=indent).encode()
            for (name, indent), content in zip(TOKENIZER.items(), contents, strict=True)
        }


def open_gguf(path: Path) -> GgufModel:
    """Opens a file; reads no weights. Raises ConversionError for one that is not supported."""
    file = read_gguf(path)
    config = config_json(file)
    return GgufModel(file, config, hugging_face_source(file, config))


def write_directory(path: Path, target: Path, dtype: str | None = None) -> None:
    """Writes the GGUF file at `path` as a directory of Hugging Face.

    Blocks become float32, plain numbers keep their dtype; `dtype` is as in `casting.cast`. One
    tensor is in memory at a time; weights above 5 GB are sharded. Raises ConversionError before
    anything is written.
    """
    model = open_gguf(path)
    _check_class(model)
    weights = cast_source(model.weights, dtype)
    config = of_plain_weights(model.config, dtype or model.config["torch_dtype"])
    files = model.tokenizer_files() | {
        name: json.dumps(content, ensure_ascii=False, indent=2).encode()
        for name, content in ((CONFIG, config), (GENERATION, model.generation_config()))
    }
    write_shards(target, weights)
    for name, content in files.items():
        with replacing(target / name) as unfinished:
            unfinished.write_bytes(content)


def _check_class(model: GgufModel) -> None:
    """Raises ConversionError where transformers would split texts in another way.

    For config.json's model_type qwen2 it takes its Qwen2Tokenizer, whatever tokenizer.json holds.
    """
    vocabulary = model.vocabulary
    if model.config["model_type"] == "qwen2" and vocabulary.pre not in OF_QWEN2:
        raise ConversionError(
            f"{model.file.path}: a qwen2 model with {PREFIX}pre {vocabulary.pre!r} cannot be "
            "written as a directory; name the file itself in model.pretrained_llm"
        )
