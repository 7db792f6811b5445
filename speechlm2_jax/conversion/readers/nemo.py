"""Reads a .nemo file: settings, weights and tokenizer files, member by member from memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError, listed
from speechlm2_jax.conversion.readers.buffers import map_file
from speechlm2_jax.conversion.readers.kinds import check_file
from speechlm2_jax.conversion.readers.source import LazySource
from speechlm2_jax.conversion.readers.tar import Inflation, read_tar
from speechlm2_jax.conversion.readers.torch_files import torch_source
from speechlm2_jax.conversion.readers.yaml_text import read_yaml

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
MAX_ARTIFACT_BYTES = 1 << 28
ARTIFACT_PREFIX = "nemo:"


@dataclass(frozen=True)
class NemoArchive:
    """A .nemo file. `config` is model_config.yaml as plain data; no class in it is looked up."""

    path: Path
    config: dict[str, Any]
    weights: LazySource
    members: Mapping[str, memoryview]

    def artifact(self, reference: str) -> bytes:
        """The content of a file that the config names (`nemo:..._tokenizer.model`).

        Raises ConversionError if the archive has no such member.
        """
        name = reference.removeprefix(ARTIFACT_PREFIX)
        if name not in self.members:
            raise ConversionError(f"{self.path}: no member {name}; it has {listed(self.members)}")
        if len(self.members[name]) > MAX_ARTIFACT_BYTES:
            raise UnsafeFileError(f"{self.path}: {name} has {len(self.members[name])} bytes")
        return bytes(self.members[name])


def read_config(path: Path) -> dict[str, Any]:
    """Reads the settings of a .nemo file and no weights."""
    return read_nemo(path).config


def read_nemo(path: Path, inflation: Inflation | None = None) -> NemoArchive:
    """Opens a .nemo file; weights are read when asked for.

    Raises UnsafeFileError for hostile archives, pickles or YAML, ConversionError for damaged ones.
    """
    check_file(path)
    try:
        members = read_tar(map_file(path), inflation)
    except ConversionError as error:
        raise type(error)(f"{path}: {error}") from error
    for name in (CONFIG, WEIGHTS):
        if name not in members:
            raise ConversionError(f"{path}: has no {name}, so it is not a .nemo file with weights")
    return NemoArchive(
        path=path,
        config=read_yaml(bytes(members[CONFIG]), f"{path}: {CONFIG}"),
        weights=torch_source(members[WEIGHTS], f"{path}: {WEIGHTS}"),
        members=members,
    )
