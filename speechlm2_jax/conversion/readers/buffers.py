"""Files as memory: mapped, never copied, and readable through the usual file interface."""

import io
import mmap
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError


def map_file(path: Path) -> memoryview:
    """Maps a file read-only. Raises ConversionError if it is missing or empty."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


class BufferFile(io.RawIOBase):
    """A read-only file over bytes that are in memory or mapped."""

    def __init__(self, content: memoryview):
        super().__init__()
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Reads at most `size` bytes; a size beyond the end asks for no memory."""
        end = None if size is None or size < 0 else self._position + size
        part = bytes(self._content[self._position : end])
        self._position += len(part)
        return part

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with the next bytes; the number of bytes at hand."""
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to another position and gives it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}
        self._position = max(0, base[whence] + offset)
        return self._position
