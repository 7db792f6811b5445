"""What an LLM is made of: a Hugging Face directory, or a GGUF file, which is read in place."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf import GgufModel, open_gguf
from speechlm2_jax.conversion.readers import TensorSource, find_gguf, open_weights, read_json
from speechlm2_jax.pretrained.locate import GENERATION_CONFIG, read_config_json
from speechlm2_jax.settings import SettingsError

CONFIG = "config.json"


def llm_config(path: Path, *, key: str) -> dict[str, Any]:
    """The config.json of an LLM. Raises SettingsError naming `key` if there is none."""
    if find_gguf(path) is None:
        return read_config_json(path / CONFIG, key=key)
    try:
        return dict(_opened(path).config)
    except ConversionError as error:
        raise SettingsError(f"{key}: {error}") from error


def llm_weights(path: Path) -> TensorSource:
    """The tensors of an LLM by Hugging Face's names. Raises ConversionError as the readers."""
    return open_weights(path) if find_gguf(path) is None else _opened(path).weights


def llm_generation_config(path: Path) -> Mapping[str, Any] | None:
    """The generation_config.json of an LLM, if it has one."""
    if find_gguf(path) is not None:
        return _opened(path).generation_config()
    file = path / GENERATION_CONFIG
    return read_json(file) if file.is_file() else None


def tokenizer_folder(path: Path, *, key: str) -> Path:
    """The folder or file that `Tokenizer` opens: of a GGUF file one that lasts as the process.

    Raises SettingsError naming `key` for a GGUF file whose tokenizer is not supported.
    """
    file = find_gguf(path)
    if file is None:
        return path
    try:
        return Path(_written_tokenizer(file, *_stamp(file)).name)
    except ConversionError as error:
        raise SettingsError(f"{key}: {error}") from error


def _opened(path: Path) -> GgufModel:
    file = find_gguf(path)
    assert file is not None
    return _opened_once(file, *_stamp(file))


def _stamp(file: Path) -> tuple[int, int]:
    """Tells whether a file has changed."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@cache
def _opened_once(file: Path, *stamp: int) -> GgufModel:
    return open_gguf(file)


@cache
def _written_tokenizer(file: Path, *stamp: int) -> "tempfile.TemporaryDirectory[str]":
    """Writes the tokenizer of a file; the folder is deleted when the process ends."""
    files = _opened_once(file, *stamp).tokenizer_files()
    folder = tempfile.TemporaryDirectory(prefix="gguf_tokenizer_")
    for name, content in files.items():
        (Path(folder.name) / name).write_bytes(content)
    return folder
