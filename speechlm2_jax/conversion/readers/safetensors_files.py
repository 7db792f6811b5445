# pyright: basic
"""Reads and writes safetensors: one file, or shards with an index; by slices, bf16 natively."""

import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.buffers import map_file
from speechlm2_jax.conversion.readers.source import (
    Index,
    LazySource,
    TensorInfo,
    TensorSource,
    extent,
    memory_source,
)

ZIP_MAGIC = b"PK\x03\x04"
NARROW: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""Floats of eight bits. Those of four and six share bytes and are not read."""
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    **NARROW,
}

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = (
    *("BOOL", "U8", "I8", *NARROW, "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
"""Dtypes as the safetensors library ranks them; the last is written first."""
ALIGNMENT_BYTES = 8


def read_safetensors(path: Path) -> LazySource:
    """Opens one file. Raises ConversionError if it is missing, damaged, or of an unknown dtype."""
    content = map_file(path)
    if bytes(content[:4]) == ZIP_MAGIC:
        raise ConversionError(f"{path} is a file of torch.save, not safetensors; name it .bin")
    try:
        handle = safe_open(path, framework="numpy")  # checks the whole header
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is not a readable safetensors file: {error}") from error
    header = _header(path, content)
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    infos = {name: _info(entry, path, name) for name, entry in header.items()}

    def fetch(name: str, index: Index | None) -> np.ndarray:
        info, entry = infos[name], header[name]
        wanted = info.shape if index is None else extent(index, info.shape)
        if 0 in wanted:
            return np.empty(wanted, info.dtype)
        if entry["dtype"] in NARROW:  # NumPy's interface of the library knows no narrow floats
            whole = _bytes_of(content, entry).view(info.dtype).reshape(info.shape)
            return np.array(whole if index is None else whole[index])
        try:
            if index is None or not info.shape:
                return handle.get_tensor(name)
            return handle.get_slice(name)[index]
        except SafetensorError as error:
            raise ConversionError(f"{path}: {name} cannot be read: {error}") from error

    def fetch_into(name: str, out: np.ndarray) -> None:
        begin, _ = header[name]["data_offsets"]
        _read_exactly(path, _values_start(content) + begin, out)

    aliases = {k: v for k, v in metadata.items() if k not in infos and v in infos}
    return LazySource(infos, fetch, aliases, fetch_into=fetch_into)


def _read_exactly(path: Path, start: int, out: np.ndarray) -> None:
    """Fills an array from a file: the only copy is the system's."""
    left = out.reshape(-1).view(np.uint8).data
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(left):
            count = file.readinto(left)
            if not count:
                raise ConversionError(f"{path} ends before its last tensor")
            left = left[count:]


def _header(path: Path, content: memoryview) -> dict[str, Any]:
    """The header of a file that the library has checked."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConversionError(f"{path}: {twice[:100]} is in the header twice")
        return dict(pairs)

    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(bytes(content[8 : 8 + size]), object_pairs_hook=once)


def _bytes_of(content: memoryview, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    return np.frombuffer(content, np.uint8, stop - start, _values_start(content) + start)


def _values_start(content: memoryview) -> int:
    """Where the values begin, behind the header."""
    (size,) = struct.unpack("<Q", content[:8])
    return 8 + size


def _info(entry: dict[str, Any], path: Path, name: str) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ConversionError(f"{path}: {name} has dtype {entry['dtype']}, which is not read")
    info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if not info.is_plausible:
        raise ConversionError(f"{path}: {name} has shape {entry['shape']}, which no tensor has")
    return info


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file; it appears whole or not at all. `metadata` holds aliases and the format."""
    write_source(path, memory_source(tensors), metadata)


def write_source(
    path: Path, source: TensorSource, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes every tensor of `source`, one at a time; the file appears whole or not at all.

    The order is that of the safetensors library: wide dtypes first, then by name. Raises
    ConversionError for a dtype that the format lacks; then and if a tensor cannot be read, nothing
    is written.
    """
    names = sorted(source.infos, key=lambda name: (-_rank(name, source.infos[name]), name))
    header = _header_of(source, names, metadata or {})
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for name in names:
                values = np.ascontiguousarray(source.read(name))
                file.write(values.reshape(-1).view(np.uint8).data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                path.parent.rmdir()
        raise


def _header_of(source: TensorSource, names: list[str], metadata: Mapping[str, str]) -> bytes:
    """The length of the header and the header, padded so that the values are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        info = source.infos[name]
        stop = start + info.size_bytes
        shape, dtype = list(info.shape), NAMES[info.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def _rank(name: str, info: TensorInfo) -> int:
    if info.dtype not in NAMES:
        raise ConversionError(f"{name} is {info.dtype}; safetensors files hold {', '.join(DTYPES)}")
    return ORDER.index(NAMES[info.dtype])
