"""zlib's inflate with what Python's module leaves out: ends of blocks, and starts at any bit."""

import ctypes
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

WINDOW_BYTES = 1 << 15
"""What deflate refers back to."""
_NAMES = ("libz.so.1", "libz.so", "libz.1.dylib", "libz.dylib", "zlib1.dll")
_OK, _STREAM_END, _BLOCK, _NO_FLUSH = 0, 1, 5, 0
_GZIP, _RAW = 31, -15
_END_OF_BLOCK, _LAST_BLOCK, _BITS = 128, 64, 7


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


class InflateError(Exception):
    """Data that is not what deflate wrote."""


class InflatedPiece(NamedTuple):
    """What one step gave."""

    data: bytes
    taken: int
    """Bytes of the input that were used."""
    bits: int | None
    """At the end of a block that another follows: bits of the last byte that belong to that."""
    is_end: bool
    """Whether the compressed data ends."""


@functools.cache
def library() -> Any:
    """The C library of this system; None if it has none."""
    for name in _NAMES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.zlibVersion.restype = ctypes.c_char_p
        return found
    return None


class Inflater:
    """Decompresses one member of a gzip file, or raw deflate data from the end of a block on.

    Raises InflateError for damaged data. `close` frees its memory.

    Args:
        window: the bytes before; None: the data begins with a gzip header.
        bits: bits of `byte` that come first.
        byte: the one before the data.
    """

    def __init__(self, window: bytes | None = None, bits: int = 0, byte: int = 0) -> None:
        self._stream, self._library = _Stream(), library()
        size, version = ctypes.sizeof(_Stream), self._library.zlibVersion()
        width = _GZIP if window is None else _RAW
        self._checked(self._library.inflateInit2_(self._by_reference, width, version, size))
        if bits:
            value = byte >> (8 - bits)
            self._checked(self._library.inflatePrime(self._by_reference, bits, value))
        if window:
            args = (self._by_reference, window, len(window))
            self._checked(self._library.inflateSetDictionary(*args))
        self._buffer = ctypes.create_string_buffer(1 << 18)

    def pieces(self, data: bytes, *, to_blocks: bool = False) -> Iterator[InflatedPiece]:
        """Decompresses input, up to its end or that of the compressed data.

        With `to_blocks` a piece ends with each block.
        """
        source = ctypes.create_string_buffer(data, len(data))
        stream, flush = self._stream, _BLOCK if to_blocks else _NO_FLUSH
        stream.next_in, stream.avail_in = ctypes.addressof(source), len(data)
        while stream.avail_in:
            before = stream.avail_in
            stream.next_out = ctypes.addressof(self._buffer)
            stream.avail_out = size = len(self._buffer)
            result = self._library.inflate(self._by_reference, flush)
            is_end = result == _STREAM_END
            made = ctypes.string_at(self._buffer, size - stream.avail_out)
            if not is_end and result != _OK:
                raise InflateError(f"damaged data (zlib {result})")
            kind = stream.data_type
            is_point = kind & _END_OF_BLOCK and not kind & _LAST_BLOCK and not is_end
            taken = before - stream.avail_in
            bits = kind & _BITS if to_blocks and is_point else None
            yield InflatedPiece(made, taken, bits, is_end)
            if is_end:
                return

    def close(self) -> None:
        """Frees the memory of the library."""
        self._library.inflateEnd(self._by_reference)

    @property
    def _by_reference(self) -> Any:
        return ctypes.byref(self._stream)

    def _checked(self, result: int) -> None:
        if result != _OK:
            raise InflateError(f"zlib {result}")
