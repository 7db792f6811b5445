"""The text of a manifest by offset: of a plain file, or of one that gzip compressed."""

import functools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from speechlm2_jax.data.index.inflate import WINDOW_BYTES, InflateError, Inflater, library
from speechlm2_jax.data.index.storage import (
    ColumnError,
    ColumnWriter,
    new_folder,
    open_columns,
    read_meta,
    write_meta,
)
from speechlm2_jax.data.json_lines import is_gzip
from speechlm2_jax.settings import SettingsError

SPACING_BYTES = 1 << 18
"""Of text between two points that decompression can start from, or a block of deflate more."""
POINTS = "points"
_READ_BYTES = 1 << 20
_HEADER = 255
"""In place of bits: a member of the file begins, with its header."""
_STRETCHES_KEPT = 16
_STRETCH_BYTES = 1 << 24
_LINE_BYTES = 1 << 13
_TYPES = {
    "text": np.uint64,
    "file": np.uint64,
    "bits": np.uint8,
    "window_end": np.uint64,
    "window": np.uint8,
}
"""Of each point: its place in the text and in the file, and the window of deflate, compressed."""


class Text(Protocol):
    """The bytes of a manifest, decompressed."""

    @property
    def size(self) -> int:
        """Bytes of all."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from an offset on; fewer at the end."""
        ...


@dataclass(frozen=True)
class PlainText:
    """A file as it is."""

    path: Path

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from an offset on; fewer at the end."""
        return os.pread(self._file, length, offset)

    @functools.cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainText, (self.path,)  # another process opens the file itself


class GzipText:
    """The text of a compressed file, from the nearest point before it on.

    Args:
        path: the file.
        columns: its points, as `write_points` wrote them.
        size: bytes of the text.
    """

    def __init__(self, path: Path, columns: Mapping[str, np.ndarray], size: int) -> None:
        self.path, self.size, self._columns = path, size, columns
        self._file = os.open(path, os.O_RDONLY)
        self._stretch = functools.lru_cache(_STRETCHES_KEPT)(self._read_stretch)

    def __reduce__(self) -> tuple[Any, ...]:
        return GzipText, (self.path, self._columns, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from an offset on; fewer at the end. Raises OSError for a damaged file."""
        parts: list[bytes] = []
        end = min(offset + length, self.size)
        while offset < end:
            place = int(np.searchsorted(self._columns["text"], offset, side="right")) - 1
            start = offset - int(self._columns["text"][place])
            part = self._stretch(place)[start : start + end - offset]
            if not part:
                raise OSError(f"{self.path}: damaged behind byte {offset} of its text")
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def _read_stretch(self, place: int) -> bytes:
        """The text from a point to the next one."""
        texts, files, bits = (self._columns[name] for name in ("text", "file", "bits"))
        is_last = place + 1 == len(texts)
        length = (self.size if is_last else int(texts[place + 1])) - int(texts[place])
        start, own = int(files[place]), int(bits[place])
        inflater = self._inflater(place, start, own)
        parts: list[bytes] = []
        try:
            while length > 0 and (data := os.pread(self._file, _READ_BYTES >> 3, start)):
                for piece in inflater.pieces(data):
                    parts.append(piece.data[:length])
                    length -= len(parts[-1])
                    if piece.is_end or not length:
                        return b"".join(parts)
                start += len(data)
        except InflateError as error:
            raise OSError(f"{self.path}: {error}") from error
        finally:
            inflater.close()
        return b"".join(parts)

    def _inflater(self, place: int, start: int, bits: int) -> Inflater:
        if bits == _HEADER:
            return Inflater()
        ends, windows = self._columns["window_end"], self._columns["window"]
        window = windows[int(ends[place - 1]) if place else 0 : int(ends[place])]
        byte = os.pread(self._file, 1, start - 1)[0] if bits else 0
        return Inflater(zlib.decompress(window.tobytes()), bits, byte)


def open_text(path: Path, points: Path | None) -> Text:
    """The text of a file; of a compressed one by the folder of its points.

    Raises ColumnError if these have changed.
    """
    if points is None:
        return PlainText(path)
    meta = read_meta(points)
    if meta is None:
        raise ColumnError(f"{points}: no such folder")
    return GzipText(path, open_columns(points, meta), meta["text_bytes"])


def whole_lines(text: Text, place: int = 0) -> Iterator[tuple[int, bytes]]:
    """Stretches of lines from the begin of one on, each with its offset."""
    rest = b""
    while block := text.read(place + len(rest), _STRETCH_BYTES):
        data = rest + block
        end = data.rfind(b"\n") + 1
        if end:
            yield place, data[:end]
        place, rest = place + end, data[end:]
    if rest:
        yield place, rest


def count_lines(data: bytes) -> int:
    """Lines of a stretch, which end with LF, CR LF or CR."""
    if b"\r" in data:
        return len(data.splitlines())
    return data.count(b"\n") + (data[-1:] not in (b"\n", b""))


def lines_between(text: Text, begin: int, end: int) -> int:
    """Lines from the begin of one to that of another."""
    lines = 0
    for start, data in whole_lines(text, begin):
        if start >= end:
            break
        lines += count_lines(data[: end - start])
    return lines


def line_at(text: Text, offset: int) -> bytes:
    """The line that begins at an offset, without its end."""
    line, size = b"", _LINE_BYTES
    while block := text.read(offset + len(line), size):
        line += block
        if (end := end_of_line(line, 0)) < len(line):
            return line[:end]
        size *= 4
    return line


def end_of_line(text: bytes, start: int) -> int:
    """Where a line ends; the end of the text for one without an end."""
    ends = [place for end in (b"\n", b"\r") if (place := text.find(end, start)) >= 0]
    return min(ends, default=len(text))


def can_index(path: Path) -> bool:
    """Whether the text of a file can be read by offset here."""
    return not is_gzip(path) or library() is not None


def write_points(
    path: Path, folder: Path, meta: Mapping[str, Any], progress: Callable[[int], object]
) -> None:
    """Decompresses a file once, and writes points that reading can start from.

    `progress` is told of bytes of the file. Raises SettingsError for a damaged file.
    """
    with new_folder(folder) as new, ExitStack() as stack:
        writers = {name: ColumnWriter(new / f"{name}.npy", kind) for name, kind in _TYPES.items()}
        for writer in writers.values():
            stack.callback(writer.close)
        window_end = size = 0
        try:
            for text, file, bits, window in _points(path, progress):
                if bits is None:
                    size = text
                    break
                packed = zlib.compress(window, 1) if bits != _HEADER else b""
                window_end += len(packed)
                values = (text, file, bits, window_end)
                for name, value in zip(_TYPES, values, strict=False):
                    writers[name].append(np.asarray([value], _TYPES[name]))
                writers["window"].append(np.frombuffer(packed, np.uint8))
        except (InflateError, OSError) as error:
            raise SettingsError(f"{path}: damaged ({error})") from error
        columns = {name: writer.finish() for name, writer in writers.items()}
        write_meta(new, {**meta, "columns": columns, "text_bytes": size})


def _points(
    path: Path, progress: Callable[[int], object]
) -> Iterator[tuple[int, int, int | None, bytes]]:
    """(place in the text, in the file, bits, window) of each point; the last one is the end."""
    text = 0
    with open(path, "rb") as file:
        while (start := _next_member(file)) is not None:
            yield text, start, _HEADER, b""
            inflater, last, window, is_end = Inflater(), text, b"", False
            try:
                while not is_end and (data := file.read(_READ_BYTES)):
                    progress(len(data))
                    for piece in inflater.pieces(data, to_blocks=True):
                        text, start = text + len(piece.data), start + piece.taken
                        window = (window + piece.data)[-WINDOW_BYTES:]
                        is_end = piece.is_end
                        if piece.bits is not None and text - last >= SPACING_BYTES:
                            yield text, start, piece.bits, window
                            last = text
            finally:
                inflater.close()
            if not is_end:
                raise InflateError("it ends before its end marker")
            file.seek(start)
    yield text, 0, None, b""


def _next_member(file: BinaryIO) -> int | None:
    """Where the next member begins behind zeros, as gzip pads files; None at the end."""
    while data := file.read(_READ_BYTES):
        if rest := data.lstrip(b"\0"):
            file.seek(-len(rest), os.SEEK_CUR)
            return file.tell()
    return None
