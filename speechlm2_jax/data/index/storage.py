"""Columns of rows in a folder: written once, checked, and mapped into memory."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

META = "meta.json"
BLOCK_BYTES = 1 << 22
"""Each such part of a column has a checksum."""
CHECKED_BLOCKS = 16
"""So many of a column are compared when it is opened; all of a small one."""

Columns = Mapping[str, np.ndarray]


class ColumnError(Exception):
    """Columns that are not what was written."""


class ColumnWriter:
    """Appends to one column, whose length need not be known before."""

    def __init__(self, path: Path, dtype: np.typing.DTypeLike) -> None:
        self._dtype, self._rows = np.dtype(dtype), 0
        self._file = open(path, "wb")  # noqa: SIM115 - `finish` closes it
        self._checksums: list[str] = []
        self._checksum, self._room = xxhash.xxh3_64(), BLOCK_BYTES
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        """Writes some rows."""
        self._rows += len(values)
        data = np.ascontiguousarray(values, self._dtype).view(np.uint8).data
        self._file.write(data)
        while len(data) >= self._room:
            self._checksum.update(data[: self._room])
            data = data[self._room :]
            self._end_block()
        self._checksum.update(data)
        self._room -= len(data)

    def finish(self) -> dict[str, Any]:
        """Closes the file; gives type, rows and checksums of the column."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        self._file.seek(0)
        self._write_header()
        self._file.close()
        return {"dtype": self._dtype.str, "rows": self._rows, "checksums": self._checksums}

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._file.close()

    def _end_block(self) -> None:
        self._checksums.append(self._checksum.hexdigest())
        self._checksum, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def _write_header(self) -> None:
        # NumPy pads it, so that one of more rows has the same size
        header = np.lib.format.header_data_from_array_1_0(np.zeros(0, self._dtype))
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (self._rows,)})


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write columns and `meta` into; it takes its place, as a whole, at the end."""
    new = folder.with_name(f".{folder.name}.{os.uname().nodename}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_columns(
    folder: Path, parts: Sequence[Columns], names: Iterable[str], meta: Mapping[str, Any]
) -> None:
    """Writes a folder of named columns, each the parts one after the other, and `meta`.

    One part is in memory at a time if parts read what they are asked for.
    """
    with new_folder(folder) as new:
        columns: dict[str, Any] = {}
        for name in names:
            writer = ColumnWriter(new / f"{name}.npy", parts[0][name].dtype)
            for part in parts:
                writer.append(part[name])
            columns[name] = writer.finish()
        write_meta(new, {**meta, "columns": columns})


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes the `meta` of a folder of columns."""
    (folder / META).write_text(json.dumps(meta))


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The `meta` of a folder of columns; None where there is none that can be read."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def open_columns(folder: Path, meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of a folder, mapped into memory. Raises ColumnError if one has changed."""
    columns: dict[str, np.ndarray] = {}
    for name, expected in meta["columns"].items():
        path = folder / f"{name}.npy"
        try:
            mapped = np.load(path, mmap_mode="r" if expected["rows"] else None)
        except (OSError, ValueError, EOFError) as error:  # EOFError: of an empty file
            raise ColumnError(f"{path}: {error}") from error
        if mapped.ndim != 1 or len(mapped) != expected["rows"] or mapped.dtype != expected["dtype"]:
            raise ColumnError(f"{path}: has the shape {mapped.shape} of {mapped.dtype}")
        columns[name] = np.asarray(mapped)  # a plain array over the same memory is faster to index
        _check(path, columns[name], expected["checksums"])
    return columns


def _check(path: Path, column: np.ndarray, checksums: Sequence[str]) -> None:
    data = column.view(np.uint8).data
    if -(-len(data) // BLOCK_BYTES) != len(checksums):
        raise ColumnError(f"{path}: another size")
    chosen = np.linspace(0, len(checksums) - 1, CHECKED_BLOCKS).astype(int) if checksums else []
    for block in sorted({int(n) for n in chosen}):
        part = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        if xxhash.xxh3_64_hexdigest(part) != checksums[block]:
            raise ColumnError(f"{path}: block {block} has changed")
