# pyright: basic
"""Reads `.metadata` of a torch distributed checkpoint: which chunk of a tensor lies where.

The file is a pickle of torch's `Metadata` records (torch.distributed.checkpoint.metadata). It is
read as data: every class in it becomes a record, and nothing is imported or called.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.readers.buffers import map_file
from speechlm2_jax.conversion.readers.pickle_machine import Names, Opaque, OpaqueType, read_pickle
from speechlm2_jax.conversion.readers.source import TensorInfo
from speechlm2_jax.conversion.readers.stored_tensor import DTYPES, TORCH_NAMES
from speechlm2_jax.conversion.readers.torch_files import MAX_PICKLE_BYTES

SUFFIX = ".distcp"
MAX_CUTS = 64
"""How often a tensor may be divided into parts that are divided again."""

_RECORDS = "torch.distributed.checkpoint.metadata"
_OLDER_RECORDS = "torch.distributed._shard.sharded_tensor.metadata"  # torch < 2.3
_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
NAMES = Names(
    values={
        **{name: TORCH_NAMES.values[name] for name in ("torch.Size", "collections.OrderedDict")},
        **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
        **{f"{_RECORDS}.{name}": OpaqueType(name) for name in _CLASSES},
        f"{_OLDER_RECORDS}.TensorProperties": OpaqueType("TensorProperties"),
        f"{_OLDER_RECORDS}.MEM_FORMAT_ENCODING": OpaqueType("_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem._StorageInfo": OpaqueType("_StorageInfo"),
        "torch.serialization._get_layout": OpaqueType("layout"),
    },
    opaque_roots=("pathlib",),
)
"""The records, and the folder's path among them; any other name is refused."""

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, and where in the folder it is stored."""

    offsets: Offsets
    sizes: tuple[int, ...]
    file: str
    start: int
    """Of what torch.save wrote, in bytes from the beginning of the file."""
    length: int
    """In bytes."""


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that is stored in chunks, which fill it without overlap."""

    info: TensorInfo
    chunks: tuple[StoredChunk, ...]


def read_metadata(file: Path) -> Mapping[str, ChunkedTensor | None]:
    """Every entry of the checkpoint by its name; None for one that is no tensor.

    Raises UnsafeFileError for a hostile file, ConversionError for one that is damaged.
    """
    content = map_file(file)
    if len(content) > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"it has {len(content)} bytes; {MAX_PICKLE_BYTES} are enough")
    fields = _fields(read_pickle(BytesIO(content), NAMES), "Metadata")
    places = _places(_mapping(fields.get("storage_data")))
    entries: dict[str, ChunkedTensor | None] = {}
    for name, entry in _mapping(fields.get("state_dict_metadata")).items():
        if not isinstance(name, str):
            raise ConversionError("it has an entry without a name")
        is_tensor = isinstance(entry, Opaque) and entry.name == "TensorStorageMetadata"
        entries[name] = _tensor(name, entry.state, places) if is_tensor else None
    return entries


def _places(storage: Mapping[Any, Any]) -> dict[tuple[str, Offsets], Mapping[str, Any]]:
    """(name of a tensor, offsets of a chunk) -> the fields of its `_StorageInfo`."""
    places: dict[tuple[str, Offsets], Mapping[str, Any]] = {}
    for index, place in storage.items():
        key = _fields(index, "MetadataIndex")
        name, offset = key.get("fqn"), key.get("offset")
        if offset is None:
            continue  # an entry that is no tensor
        if not isinstance(name, str):
            raise ConversionError("it has an entry without a name")
        if (
            places.setdefault((name, _numbers(offset)), found := _fields(place, "_StorageInfo"))
            != found
        ):
            raise ConversionError(f"{name}: the chunk at {list(offset)} is stored twice")
    return places


def _tensor(
    name: str, fields: Any, places: Mapping[tuple[str, Offsets], Mapping[str, Any]]
) -> ChunkedTensor:
    try:
        info = TensorInfo(_numbers(fields["size"]), _dtype(fields["properties"]))
        if not info.is_plausible:
            raise UnsafeFileError(f"it has the shape {list(info.shape)}, which no tensor has")
        boxes = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
        chunks = tuple(_chunks(name, boxes, places))
        if any(TensorInfo(c.sizes, info.dtype).size_bytes > c.length for c in chunks):
            raise ConversionError("a chunk has more bytes than are stored of it")
        if not all(len(chunk.sizes) == len(info.shape) for chunk in chunks) or not _fill(
            chunks, (0,) * len(info.shape), info.shape
        ):
            raise ConversionError(f"its chunks do not fill its shape {list(info.shape)}")
    except (KeyError, TypeError) as error:
        raise ConversionError(f"{name}: a record is damaged: {error}") from error
    except ConversionError as error:
        raise type(error)(f"{name}: {error}") from error
    return ChunkedTensor(info, chunks)


def _dtype(properties: Any) -> np.dtype[Any]:
    state = properties.state if isinstance(properties, Opaque) else None
    if not isinstance(state, tuple) or not isinstance(state[0], np.dtype):
        raise ConversionError("it has no dtype")
    return state[0]


def _chunks(
    name: str,
    boxes: Sequence[Mapping[str, Any]],
    places: Mapping[tuple[str, Offsets], Mapping[str, Any]],
) -> Iterator[StoredChunk]:
    """The chunks that have elements; a device without a part of a tensor stores an empty one."""
    for box in boxes:
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if 0 in sizes:
            continue
        place = places.get((name, offsets))
        if place is None or len(offsets) != len(sizes):
            raise ConversionError(f"its chunk at {list(offsets)} is not stored")
        if place.get("transform_descriptors"):
            raise ConversionError(
                f"it is stored compressed ({place['transform_descriptors']}), which is not "
                "supported; save it without extensions"
            )
        file, start, length = place["relative_path"], place["offset"], place["length"]
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
            raise UnsafeFileError(f"it is stored in {file!r}, which is no file of the folder")
        yield StoredChunk(offsets, sizes, file, *_numbers((start, length)))


def _fill(chunks: Sequence[StoredChunk], low: Offsets, high: Offsets, cuts: int = MAX_CUTS) -> bool:
    """Whether the chunks fill the box from `low` to `high` without gap or overlap.

    The box is divided between chunks along one axis, and its parts in the same way: every way of
    sharding a tensor gives such chunks.
    """
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return not chunks
    if len(chunks) == 1:
        ends = tuple(a + n for a, n in zip(chunks[0].offsets, chunks[0].sizes, strict=True))
        return (chunks[0].offsets, ends) == (low, high)
    for axis in range(len(low)) if cuts else ():
        parts = _divided(chunks, axis)
        if len(parts) > 1:
            starts = [part[0].offsets[axis] for part in parts] + [high[axis]]
            return starts[0] == low[axis] and all(
                _fill(part, _with(low, axis, start), _with(high, axis, end), cuts - 1)
                for part, start, end in zip(parts, starts, starts[1:], strict=False)
            )
    return False


def _divided(chunks: Sequence[StoredChunk], axis: int) -> list[list[StoredChunk]]:
    """Groups of chunks in order, of which each begins where all before it have ended."""
    parts: list[list[StoredChunk]] = []
    end = -1
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        if not parts or chunk.offsets[axis] >= end:
            parts.append([])
        parts[-1].append(chunk)
        end = max(end, chunk.offsets[axis] + chunk.sizes[axis])
    return parts


def _with(corner: Offsets, axis: int, value: int) -> Offsets:
    return (*corner[:axis], value, *corner[axis + 1 :])


def _fields(record: Any, kind: str) -> Mapping[str, Any]:
    """The attributes of a record. Raises ConversionError if it is of another kind."""
    if not isinstance(record, Opaque) or record.name != kind or not isinstance(record.state, dict):
        raise ConversionError(f"it has no {kind} where one is expected")
    return record.state


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ConversionError("it has no table of what is stored")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    """Offsets and sizes. Raises UnsafeFileError for anything but a tuple of counts."""
    if not isinstance(values, tuple) or not all(type(n) is int and n >= 0 for n in values):
        raise UnsafeFileError("it gives a place or a size that is not a count")
    return values
