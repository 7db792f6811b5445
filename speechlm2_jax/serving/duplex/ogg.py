"""Ogg pages, as they come and go in a stream (RFC 3533); one logical stream, Opus' (RFC 7845)."""

import struct
from collections.abc import Iterator

CAPTURE = b"OggS"
HEADER = struct.Struct("<4sBBqIIIB")
"""Capture pattern, version, flags, granule position, serial, page number, checksum, segments."""
CONTINUED, FIRST = 1, 2
MAX_SEGMENT = 255
MAX_PACKET_BYTES = 1 << 16
POLYNOMIAL = 0x04C11DB7


class OggError(ValueError):
    """Bytes that are no Ogg stream."""


def _table() -> list[int]:
    rows = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (POLYNOMIAL if value & 0x80000000 else 0)
        rows.append(value & 0xFFFFFFFF)
    return rows


_ROWS = _table()


def checksum(page: bytes) -> int:
    """The checksum of a page whose own field of it is zero."""
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ _ROWS[(value >> 24) ^ byte]
    return value


class OggWriter:
    """Makes a page of each packet, so that none waits for another."""

    def __init__(self, serial: int) -> None:
        self._serial, self._pages = serial, 0

    def page(self, packet: bytes, granule: int, flags: int = 0) -> bytes:
        """A page with one packet, which ends at a granule position (samples of 48 kHz)."""
        if len(packet) >= MAX_SEGMENT * MAX_SEGMENT:
            raise OggError(f"a packet of {len(packet)} bytes does not fit a page")
        full, rest = divmod(len(packet), MAX_SEGMENT)
        segments = bytes([MAX_SEGMENT] * full + [rest])
        fields = (CAPTURE, 0, flags, granule, self._serial, self._pages)
        self._pages += 1
        head = HEADER.pack(*fields, 0, len(segments))
        value = checksum(head + segments + packet)
        return HEADER.pack(*fields, value, len(segments)) + segments + packet


class OggReader:
    """Finds the packets of a stream whose bytes come in any pieces."""

    def __init__(self) -> None:
        self._held, self._packet = memoryview(b""), b""

    def push(self, data: bytes) -> Iterator[bytes]:
        """Takes the next bytes and iterates over the packets that they complete.

        Raises OggError for bytes that are no page, for a damaged page, and for a packet of more
        than MAX_PACKET_BYTES.
        """
        self._held = memoryview(bytes(self._held) + data)
        while (page := self._next_page()) is not None:
            flags, segments, body = page
            if not flags & CONTINUED:
                self._packet = b""
            at = 0
            for length in segments:
                self._packet += body[at : at + length]
                at += length
                if len(self._packet) > MAX_PACKET_BYTES:
                    raise OggError(f"a packet has more than {MAX_PACKET_BYTES} bytes")
                if length < MAX_SEGMENT:
                    packet, self._packet = self._packet, b""
                    yield packet

    def _next_page(self) -> tuple[int, bytes, bytes] | None:
        """Flags, segment lengths and body of the next page, if it is there as a whole."""
        held = self._held
        if bytes(held[:4]) != CAPTURE[: len(held)]:
            raise OggError("no Ogg page where one must begin")
        if len(held) < HEADER.size:
            return None
        _, version, flags, _, _, _, expected, count = HEADER.unpack_from(held)
        if version != 0:
            raise OggError(f"Ogg version {version} is unknown")
        start = HEADER.size + count
        segments = bytes(held[HEADER.size : start])
        end = start + sum(segments)
        if len(segments) < count or len(held) < end:
            return None
        page = bytes(held[:end])
        self._held = held[end:]
        if checksum(page[:22] + bytes(4) + page[26:]) != expected:
            raise OggError("the checksum of an Ogg page is wrong")
        return flags, segments, page[start:]
