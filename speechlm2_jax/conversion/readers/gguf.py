# pyright: basic
"""Reads GGUF, llama.cpp's format: one file with weights, sizes and the tokenizer.

The layout is that of ggml's `docs/gguf.md`: a header of keys and values, a table of tensors, and
the tensors. Counts, lengths and offsets are checked against the file before they are used.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.readers.buffers import map_file
from speechlm2_jax.conversion.readers.gguf_blocks import (
    BLOCK_TYPES,
    OTHER_TYPES,
    BlockType,
    expand,
)
from speechlm2_jax.conversion.readers.source import Index, LazySource, TensorInfo, extent

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 16
MAX_NAME_BYTES = 1 << 10
MAX_TEXT_BYTES = 1 << 24
MAX_VALUES = 1 << 24
"""Elements of all arrays together; a vocabulary has three arrays of up to 2^18."""
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 20
ALIGNMENT = "general.alignment"
NUMBERS = MappingProxyType(
    {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8",
     11: "<i8", 12: "<f8"}
)  # fmt: skip
"""Types of numbers -> NumPy's."""
BOOL, TEXT, ARRAY = 7, 8, 9


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor in the file: its block type, shape (slowest axis first), and first byte."""

    kind: BlockType
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a run along the last axis."""
        return self.shape[-1] // self.kind.elements * self.kind.size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """One file: its keys with their values, and its tensors under llama.cpp's names."""

    path: Path
    metadata: Mapping[str, Any]
    weights: LazySource


def read_gguf(path: Path) -> GgufFile:
    """Opens a file; reads no tensor yet.

    Raises ConversionError for a damaged file, another version or blocks of another type,
    UnsafeFileError for numbers that point outside of the file.
    """
    content = map_file(path)
    cursor = _Cursor(path, content)
    tensor_count = _check_beginning(cursor)
    metadata = _read_metadata(cursor)
    tensors = _read_tensors(cursor, tensor_count, metadata)
    return GgufFile(path, metadata, _source(content, tensors))


class _Cursor:
    """Reads the header from the first byte on, and never beyond the end of the file."""

    def __init__(self, path: Path, content: memoryview):
        self.path, self.content = path, content
        self.position, self.values = 0, 0

    def take(self, size: int, what: str) -> memoryview:
        """The next bytes. Raises ConversionError if the file ends before."""
        if size > len(self.content) - self.position:
            raise ConversionError(
                f"{self.path} is cut short or damaged: {what} has {size} bytes, "
                f"{len(self.content) - self.position} are left; fetch the file again"
            )
        part = self.content[self.position : self.position + size]
        self.position += size
        return part

    def number(self, kind: str, what: str) -> int:
        """The next number, in struct's letter for its type."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}"), what))[0]

    def text(self, what: str, limit: int) -> str:
        """The next text: its length in bytes, then UTF-8."""
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise self.unsafe(f"{what} has {length} bytes, at most {limit} are read")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(f"{self.path}: {what} is not UTF-8 text") from error

    def unsafe(self, problem: str) -> UnsafeFileError:
        """An error of a header that no writer makes."""
        return UnsafeFileError(f"{self.path}: {problem}")


def _check_beginning(cursor: _Cursor) -> int:
    """Checks magic and version; the number of tensors. The cursor stands at the keys then."""
    if bytes(cursor.take(4, "the beginning")) != MAGIC:
        raise ConversionError(f"{cursor.path} is not a GGUF file: it begins otherwise")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"GGUF version {version}" if swapped > 9 else "GGUF for big-endian machines"
        raise ConversionError(
            f"{cursor.path} is {what}, which is not supported; write version 3, little-endian"
        )
    count = cursor.number("Q", "the number of tensors")
    if count > MAX_TENSORS:
        raise cursor.unsafe(f"{count} tensors, at most {MAX_TENSORS} are read")
    return count


def _read_metadata(cursor: _Cursor) -> dict[str, Any]:
    """All keys with their values: bool, int, float, str, or a list of one of these."""
    count = cursor.number("Q", "the number of keys")
    if count > MAX_KEYS:
        raise cursor.unsafe(f"{count} keys, at most {MAX_KEYS} are read")
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.text(f"key {number}", MAX_NAME_BYTES)
        if key in metadata:
            raise ConversionError(f"{cursor.path}: the key {key!r} is there twice")
        metadata[key] = _read_value(cursor, cursor.number("I", f"the type of {key}"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == TEXT:
        return cursor.text(key, MAX_TEXT_BYTES)
    if kind in NUMBERS:
        return _read_numbers(cursor, kind, 1, key)[0]
    if kind != ARRAY:
        raise ConversionError(f"{cursor.path}: {key} has a value of unknown type {kind}")
    inner = cursor.number("I", f"the type of {key}")
    count = cursor.number("Q", f"the length of {key}")
    cursor.values += min(count, MAX_VALUES + 1)
    if cursor.values > MAX_VALUES:
        raise cursor.unsafe(f"{key} has {count} elements, at most {MAX_VALUES} are read in all")
    if inner == TEXT:
        return [cursor.text(f"{key}[{i}]", MAX_TEXT_BYTES) for i in range(count)]
    if inner not in NUMBERS:
        raise ConversionError(f"{cursor.path}: {key} is a list of unknown type {inner}")
    return _read_numbers(cursor, inner, count, key)


def _read_numbers(cursor: _Cursor, kind: int, count: int, key: str) -> list[Any]:
    dtype = np.dtype(NUMBERS[kind])
    numbers = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)
    return (numbers != 0).tolist() if kind == BOOL else numbers.tolist()


def _read_tensors(
    cursor: _Cursor, count: int, metadata: Mapping[str, Any]
) -> dict[str, StoredBlocks]:
    """The table of tensors. They must lie in the file, one behind the other."""
    alignment = metadata.get(ALIGNMENT, 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
        raise cursor.unsafe(f"{ALIGNMENT} is {str(alignment)[:40]}, which no file has")
    found: dict[str, StoredBlocks] = {}
    for number in range(count):
        name = cursor.text(f"the name of tensor {number}", MAX_NAME_BYTES)
        if name in found:
            raise ConversionError(f"{cursor.path}: the tensor {name!r} is there twice")
        found[name] = _read_tensor(cursor, name, alignment)
    data = -(-cursor.position // alignment) * alignment
    placed = {n: StoredBlocks(t.kind, t.shape, data + t.start) for n, t in found.items()}
    end, before = data, ""
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise cursor.unsafe(f"the tensor {name} overlaps {before}")
        end, before = tensor.start + tensor.size_bytes, name
        if end > len(cursor.content):
            raise ConversionError(
                f"{cursor.path} is cut short or damaged: {name} ends at byte {end} of "
                f"{len(cursor.content)}; fetch the file again"
            )
    return placed


def _read_tensor(cursor: _Cursor, name: str, alignment: int) -> StoredBlocks:
    """One entry of the table, its start counted from the first tensor."""
    axes = cursor.number("I", f"the number of axes of {name}")
    if not 1 <= axes <= MAX_AXES:
        raise cursor.unsafe(f"{name} has {axes} axes, expected 1 to {MAX_AXES}")
    sizes = [cursor.number("Q", f"the shape of {name}") for _ in range(axes)]
    number, start = cursor.number("I", f"the type of {name}"), cursor.number("Q", name)
    if number not in BLOCK_TYPES:
        what = OTHER_TYPES.get(number, f"ggml type {number}")
        known = ", ".join(kind.name for kind in BLOCK_TYPES.values())
        raise ConversionError(
            f"{cursor.path}: {name} is stored as {what}, which is not supported; use a file with "
            f"{known} alone"
        )
    kind, shape = BLOCK_TYPES[number], tuple(reversed(sizes))
    if 0 in shape or not TensorInfo(shape, kind.dtype).is_plausible:
        raise cursor.unsafe(f"{name} has shape {list(shape)}, which no tensor has")
    if shape[-1] % kind.elements:
        raise cursor.unsafe(f"{name} has rows of {shape[-1]} elements, no whole {kind.name} blocks")
    if start % alignment:
        raise cursor.unsafe(f"{name} starts at {start}, no multiple of {ALIGNMENT} {alignment}")
    return StoredBlocks(kind, shape, start)


def _source(content: memoryview, tensors: Mapping[str, StoredBlocks]) -> LazySource:
    infos = {name: TensorInfo(t.shape, t.kind.dtype) for name, t in tensors.items()}
    return LazySource(infos, lambda name, index: _read_part(content, tensors[name], index))


def _read_part(content: memoryview, tensor: StoredBlocks, index: Index | None) -> np.ndarray:
    """Values of a tensor, or of a part; of blocks, only the rows that are asked for expand."""
    data = np.frombuffer(content, np.uint8, tensor.size_bytes, tensor.start)
    if tensor.kind.expand is None:
        plain = data.view(tensor.kind.dtype).reshape(tensor.shape)
        return np.array(plain if index is None else plain[index], order="C")
    rows = data.reshape(*tensor.shape[:-1], tensor.row_bytes)
    if index is None:
        return expand(tensor.kind, rows.reshape(-1, tensor.row_bytes)).reshape(tensor.shape)
    wanted = rows[index[:-1]]
    values = expand(tensor.kind, np.ascontiguousarray(wanted).reshape(-1, tensor.row_bytes))
    values = values.reshape(*wanted.shape[:-1], tensor.shape[-1])[..., index[-1]]
    return np.ascontiguousarray(values).reshape(extent(index, tensor.shape))
