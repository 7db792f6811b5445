"""Walks a tar archive in memory: nothing is extracted, and only plain files are taken.

Header blocks are decoded by the standard library (`TarInfo.frombuf`); the walk is ours, so that
no header can ask for memory, name a place on disk, or point at another member.
"""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError

BLOCK = 512
CHUNK = 1 << 24
GZIP_MAGIC = b"\x1f\x8b"
MAX_MEMBERS = 10_000
MAX_HEADER_BYTES = 1 << 20
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
HEADER_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}


class Inflation(NamedTuple):
    """How much a compressed archive may hold: `ratio` times its size, and `floor` in any case."""

    ratio: int = 50
    floor: int = 1 << 26


def read_tar(content: memoryview, inflation: Inflation | None = None) -> dict[str, memoryview]:
    """Gives the members of a plain or gzip-compressed tar by name, without a leading `./`.

    Raises UnsafeFileError for absolute names, `..`, links, devices, sparse files, two members of
    one name, sizes beyond the file, and compressed data that expands too far.
    """
    if bytes(content[:2]) == GZIP_MAGIC:
        limits = inflation or Inflation()
        content = _inflate(content, max(limits.floor, limits.ratio * len(content)))
    members: dict[str, memoryview] = {}
    for member in _walk(content):
        if member.name in members:
            raise UnsafeFileError(f"two members of the archive are called {member.name}")
        if len(members) == MAX_MEMBERS:
            raise UnsafeFileError(f"the archive has more than {MAX_MEMBERS} members")
        members[member.name] = member.data
    return members


def _inflate(content: memoryview, limit: int) -> memoryview:
    """Decompresses gzip members into memory, at most `limit` bytes."""
    inflated = bytearray()
    while len(content):
        machine = zlib.decompressobj(wbits=31)
        while not machine.eof:
            offered = content[:CHUNK]
            try:
                part = machine.decompress(offered, CHUNK)
            except zlib.error as error:
                raise ConversionError(f"the compressed archive is damaged: {error}") from error
            left = len(machine.unconsumed_tail) + len(machine.unused_data)
            if not part and left == len(offered):
                raise ConversionError("the compressed archive is cut short")
            content = content[len(offered) - left :]
            inflated += part
            if len(inflated) > limit:
                raise UnsafeFileError(
                    f"the compressed archive expands to more than {limit} bytes; "
                    "if it is meant to, unpack the gzip layer and load the plain tar"
                )
        if bytes(content[:2]) != GZIP_MAGIC:
            break  # gzip allows padding after its end
    return memoryview(inflated).toreadonly()


@dataclass(frozen=True)
class _Member:
    name: str
    data: memoryview


@dataclass(frozen=True)
class _Extended:
    """Fields of a pax or GNU header for the member after it."""

    name: str | None = None
    size: int | None = None


def _walk(content: memoryview) -> Iterator[_Member]:
    at = 0
    extended = _Extended()
    while True:
        block = content[at : at + BLOCK]
        if not any(block):
            if len(block) not in (0, BLOCK):
                raise ConversionError("the archive is cut short")
            return
        info = _header(block)
        size = info.size if extended.size is None else extended.size
        data = content[at + BLOCK : at + BLOCK + size]
        if size < 0 or len(data) != size:
            raise UnsafeFileError(
                f"member {info.name} claims {size} bytes, more than the archive has"
            )
        at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        if info.type in HEADER_TYPES:
            extended = _extend(extended, info, data)
            continue
        name = _safe_name(info.name if extended.name is None else extended.name)
        extended = _Extended()
        if info.type in FILE_TYPES:
            yield _Member(name, data)
        elif info.type != tarfile.DIRTYPE:
            kind = KINDS.get(info.type, f"of type {info.type!r}")
            raise UnsafeFileError(f"member {name} is {kind}; only plain files are read")


def _header(block: memoryview) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(bytes(block), "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError, ValueError) as error:
        raise ConversionError(f"the archive has a damaged header: {error}") from error


def _extend(known: _Extended, info: tarfile.TarInfo, data: memoryview) -> _Extended:
    """Reads an extended header: a long name or a size for the next member."""
    if len(data) > MAX_HEADER_BYTES:
        raise UnsafeFileError(f"the archive has an extended header of {len(data)} bytes")
    try:
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return _Extended(bytes(data).rstrip(b"\0").decode(), known.size)
        records = dict(_pax_records(bytes(data)))
        if any(key.startswith("GNU.sparse") for key in records):
            raise UnsafeFileError("the archive has a sparse file; only plain files are read")
        if info.type == tarfile.XGLTYPE:
            if "path" in records or "size" in records:
                raise UnsafeFileError("the archive renames or resizes all its members")
            return known
        size = int(records["size"]) if "size" in records else known.size
        return _Extended(records.get("path", known.name), size)
    except UnsafeFileError:
        raise
    except ValueError as error:
        raise ConversionError(f"the archive has a damaged extended header: {error}") from error


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Splits `LENGTH KEY=VALUE` lines (POSIX.1-2001 pax)."""
    while data:
        length = int(data[: data.index(b" ")])
        record = data[data.index(b" ") + 1 : length]
        if length > len(data) or not record.endswith(b"\n"):
            raise ValueError("a record of a wrong length")
        key, _, value = record[:-1].partition(b"=")
        yield key.decode(), value.decode()
        data = data[length:]


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UnsafeFileError(f"member {name!r} points outside the archive")
    return str(path)
