# pyright: basic
"""Reads and writes safetensors: one file, or shards with an index; by slices, bf16 natively."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.source import Index, LazySource, TensorInfo

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_safetensors(path: Path) -> LazySource:
    """Opens one file. Raises ConversionError if it is missing, damaged, or of an unknown dtype."""
    try:
        handle = safe_open(path, framework="numpy")
        metadata: dict[str, str] = handle.metadata() or {}
        infos = {name: _info(handle.get_slice(name), path, name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is not a readable safetensors file: {error}") from error

    def fetch(name: str, index: Index | None) -> np.ndarray:
        try:
            if index is None or not infos[name].shape:
                return handle.get_tensor(name)
            return handle.get_slice(name)[index]
        except SafetensorError as error:
            raise ConversionError(f"{path}: {name} cannot be read: {error}") from error

    aliases = {k: v for k, v in metadata.items() if k not in infos and v in infos}
    return LazySource(infos, fetch, aliases)


def _info(part: Any, path: Path, name: str) -> TensorInfo:
    if part.get_dtype() not in DTYPES:
        raise ConversionError(f"{path}: {name} has dtype {part.get_dtype()}, which is not read")
    return TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()])


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file; it appears whole or not at all. `metadata` holds aliases and the format.

    Its permissions are those of any new file in that folder (safetensors alone gives 0600).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    contiguous = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
    try:
        unfinished.touch()
        permissions = unfinished.stat().st_mode & 0o777
        save_file(contiguous, unfinished, metadata=dict(metadata) if metadata else None)
        unfinished.chmod(permissions)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
