"""Ogg/Opus files whose bytes follow from the samples alone."""

import io
from pathlib import Path

import numpy as np
import soundfile

SERIAL_BYTES, CHECKSUM_BYTES = slice(14, 18), slice(22, 26)  # of a page's header (RFC 3533)
SEGMENTS_BYTE, HEADER_BYTES = 26, 27


def write_opus(path: Path, wave: np.ndarray, rate_hz: int, level: float) -> None:
    """Writes float32 samples [S] as Ogg/Opus; `level` is libsndfile's compression level, 0 to 1.

    libsndfile numbers each stream at random; here every stream is number 1, so that the same
    samples give the same file.
    """
    file = io.BytesIO()
    soundfile.write(file, wave, rate_hz, "OPUS", format="OGG", compression_level=level)
    path.write_bytes(renumber(file.getvalue(), serial=1))


def renumber(stream: bytes, serial: int) -> bytes:
    """Returns an Ogg stream with another serial number on every page, and the checksums for it."""
    pages, start = [], 0
    while start < len(stream):
        segments = stream[start + SEGMENTS_BYTE]
        body = start + HEADER_BYTES + segments
        end = body + sum(stream[start + HEADER_BYTES : body])
        page = bytearray(stream[start:end])
        page[SERIAL_BYTES] = serial.to_bytes(4, "little")
        page[CHECKSUM_BYTES] = bytes(4)
        page[CHECKSUM_BYTES] = _checksum(page).to_bytes(4, "little")
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def _table_entry(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
    return value & 0xFFFFFFFF


TABLE = [_table_entry(byte) for byte in range(256)]


def _checksum(page: bytes | bytearray) -> int:
    """Returns Ogg's CRC-32: polynomial 04c11db7, not reflected, starting at zero."""
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ TABLE[(value >> 24) ^ byte]
    return value
