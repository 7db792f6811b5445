# pyright: basic
"""Reads what torch.save wrote (.bin, .ckpt, .pt): no torch, nothing executed, nothing copied.

Two formats: a zip archive with the pickle and one uncompressed member per storage (torch >= 1.6),
and before that a sequence of pickles followed by the storages.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError, listed
from speechlm2_jax.conversion.readers.buffers import BufferFile, map_file
from speechlm2_jax.conversion.readers.kinds import check_file
from speechlm2_jax.conversion.readers.pickle_machine import read_pickle
from speechlm2_jax.conversion.readers.source import Index, LazySource
from speechlm2_jax.conversion.readers.stored_tensor import (
    TORCH_NAMES,
    Storage,
    StorageType,
    StoredTensor,
)

MAX_PICKLE_BYTES = 1 << 28
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30


def read_torch_file(path: Path) -> LazySource:
    """Opens a .bin, .ckpt or .pt file as tensors that are read when asked for.

    Raises UnsafeFileError if it asks for more than tensors, ConversionError if it is damaged.
    """
    check_file(path)
    return torch_source(map_file(path), str(path))


def read_hyper_parameters(path: Path) -> dict[str, Any]:
    """The hyper_parameters that Lightning keeps in a .ckpt; {} if there are none.

    Raises ConversionError if they are not plain data.
    """
    check_file(path)
    root = read_torch_object(map_file(path), str(path))
    found = root.get("hyper_parameters", {}) if isinstance(root, dict) else {}
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: its hyper_parameters are {_kind(found)}, not plain data")
    return found


def torch_source(content: memoryview, where: str) -> LazySource:
    """The tensors of torch.save's bytes; of a Lightning checkpoint, those of its state_dict.

    Names of one and the same stored tensor (tied weights) are one name and its aliases.
    """
    tensors = state_dict(read_torch_object(content, where), where)
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(tensors):
        known = first.setdefault(tensors[name].identity, name)
        if known != name:
            aliases[name] = known

    def fetch(name: str, index: Index | None) -> Any:
        return tensors[name].read(index)

    infos = {name: x.info for name, x in tensors.items() if name not in aliases}
    return LazySource(infos, fetch, aliases)


def read_torch_object(content: memoryview, where: str) -> Any:
    """The whole object: containers, StoredTensors, and Opaque records of everything else."""
    try:
        if bytes(content[:4]) == ZIP_MAGIC:
            return _read_zip(content)
        if bytes(content[8:9]) == b"{":
            raise ConversionError("this is a safetensors file; name it .safetensors")
        return _read_legacy(content)
    except ConversionError as error:
        raise type(error)(f"{where}: {error}") from error


def state_dict(root: object, where: str) -> Mapping[str, StoredTensor]:
    """Picks the tensors by name. Raises ConversionError if there is anything else among them."""
    inner = root.get("state_dict", root) if isinstance(root, dict) else root
    if not isinstance(inner, dict):
        raise ConversionError(f"{where}: holds no dictionary of tensors but {_kind(inner)}")
    other = [str(name) for name, value in inner.items() if not isinstance(value, StoredTensor)]
    if other or not all(isinstance(name, str) for name in inner):
        raise ConversionError(f"{where}: these entries are no tensors: {listed(other)}")
    return inner


def _kind(value: object) -> str:
    return getattr(value, "name", type(value).__name__)


@dataclass
class _Zip:
    """The members of a torch archive; storages are slices of the file."""

    content: memoryview
    members: dict[str, zipfile.ZipInfo]
    prefix: str

    def member(self, name: str) -> memoryview:
        info = self.members.get(self.prefix + name)
        if info is None:
            raise ConversionError(f"member {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnsafeFileError(f"member {name} is compressed or encrypted; torch writes neither")
        head = self.content[info.header_offset : info.header_offset + LOCAL_HEADER_BYTES]
        if len(head) < LOCAL_HEADER_BYTES or bytes(head[:4]) != ZIP_MAGIC:
            raise ConversionError(f"member {name} has a damaged header")
        name_bytes, extra_bytes = struct.unpack("<HH", head[26:30])
        start = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        data = self.content[start : start + info.file_size]
        if len(data) != info.file_size:
            raise ConversionError(f"member {name} is cut short")
        return data

    def checked(self, name: str) -> memoryview:
        """A member whose checksum is right."""
        data = self.member(name)
        if zlib.crc32(data) != self.members[self.prefix + name].CRC:
            raise ConversionError(
                f"member {name} has a wrong checksum: the file is damaged "
                "(or was saved with torch.serialization.set_crc32_options(False))"
            )
        return data


def _open_zip(content: memoryview) -> _Zip:
    try:
        with zipfile.ZipFile(BufferFile(content)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ConversionError(f"the zip archive is damaged: {error}") from error
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise UnsafeFileError("two members of the zip archive have one name")
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ConversionError("the zip archive is not one that torch.save writes (no data.pkl)")
    if roots[0] + "constants.pkl" in members:
        raise ConversionError("this is a TorchScript program, not weights; save a state_dict")
    return _Zip(content, members, roots[0])


def _read_zip(content: memoryview) -> Any:
    archive = _open_zip(content)
    order = archive.prefix + "byteorder"
    if order in archive.members and bytes(archive.member("byteorder")) != b"little":
        raise ConversionError("the file was written on a big-endian machine; save it on another")
    pickled = archive.member("data.pkl")
    if len(pickled) > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"its pickle has {len(pickled)} bytes; {MAX_PICKLE_BYTES} are enough")
    storages: dict[str, Storage] = {}

    def fetcher(key: str) -> Callable[[], memoryview]:
        return _once_checked(archive, f"data/{key}")

    persistent = partial(_storage, storages=storages, fetcher=fetcher)
    return read_pickle(BytesIO(archive.checked("data.pkl")), TORCH_NAMES, persistent)


def _once_checked(archive: _Zip, name: str) -> Callable[[], memoryview]:
    kept: list[memoryview] = []

    def fetch() -> memoryview:
        if not kept:
            kept.append(archive.checked(name))
        return kept[0]

    return fetch


def _storage(
    reference: object,
    *,
    storages: dict[str, Storage],
    fetcher: Callable[[str], Callable[[], memoryview]],
) -> Storage:
    """('storage', type, key, device, elements[, view]): where a tensor's bytes are."""
    if not (isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"):
        raise UnsafeFileError("the pickle refers to something that is no storage")
    _, storage_type, key, _, elements = reference[:5]
    if len(reference) > 5 and reference[5] is not None:
        raise ConversionError("views of storages (torch < 0.4) are not supported; save it again")
    if not (isinstance(storage_type, StorageType) and isinstance(key, str)):
        raise UnsafeFileError("the pickle refers to a storage of an unknown type")
    if type(elements) is not int or elements < 0:
        raise UnsafeFileError(f"storage {key} declares {elements!r} elements")
    made = storages.setdefault(key, Storage(key, storage_type.dtype, elements, fetcher(key)))
    if (made.dtype, made.elements) != (storage_type.dtype, elements):
        raise ConversionError(f"storage {key} is described in two ways")
    return made


def _read_legacy(content: memoryview) -> Any:
    stream = BufferFile(content)
    places: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def fetcher(key: str) -> Callable[[], memoryview]:
        return lambda: content[places[key] : places[key] + storages[key].size_bytes]

    persistent = partial(_storage, storages=storages, fetcher=fetcher)
    try:
        magic = read_pickle(stream, TORCH_NAMES)
        version = read_pickle(stream, TORCH_NAMES)
    except ConversionError as error:
        if isinstance(error, UnsafeFileError):
            raise
        raise ConversionError("this is not a file of torch.save") from error
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION:
        raise ConversionError("this is not a file of torch.save")
    read_pickle(stream, TORCH_NAMES)  # the writer's byte order and type sizes
    root = read_pickle(stream, TORCH_NAMES, persistent)
    for key in read_pickle(stream, TORCH_NAMES):
        _locate(key, stream, storages, places)
    return root


def _locate(
    key: object, stream: BufferFile, storages: Mapping[str, Storage], places: dict[str, int]
) -> None:
    """Notes where the bytes of a legacy storage begin, and skips them."""
    head = stream.read(8)
    if not isinstance(key, str) or key not in storages or len(head) != 8:
        raise ConversionError("the storages do not fit the pickle; the file is damaged")
    storage = storages[key]
    if struct.unpack("<q", head)[0] != storage.elements:
        raise ConversionError(f"storage {key} has a different size than its pickle declares")
    places[key] = stream.tell()
    stream.seek(storage.size_bytes, 1)
