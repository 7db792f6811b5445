"""Frames of MPEG audio (MP3 and layers I and II): their headers, and where a file's first one is.

FFmpeg looks for the Xing or Info frame, which holds the encoder's delay, only behind ID3v2 tags.
Behind an APE tag, padding or junk it would decode that frame as sound and keep the delay.
"""

import struct
from io import BufferedIOBase

HEADER_BYTES = 4
_SEARCHED_BYTES = 1 << 20
_CHAIN = 4
"""So many frames in a row are no accident; a file may end before."""
_SURE_CHAIN = 2
"""The same where a frame is expected, and for a first frame with an encoder's header."""
_ENCODER_HEADERS = (b"Xing", b"Info", b"VBRI")
_ENCODER_HEADER_ENDS = 40
"""Bytes from the start of a frame up to the end of such a name, at most."""
_LSF = ((32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),) + 2 * (
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_KBPS = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
"""Bit rates of layers I, II and III by index from 1; `_LSF`: of MPEG 2 and 2.5, with low rates."""
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""Sample rates by the two bits that name the version: MPEG 1, 2 and 2.5."""
_TRAILERS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")


def frame_bytes(data: bytes | bytearray | memoryview, place: int = 0) -> int | None:
    """Bytes of the frame whose header is at `place`; None if no header is there.

    Frames of a free bit rate have none: their headers do not tell their length.
    """
    if place + HEADER_BYTES > len(data):
        return None
    (header,) = struct.unpack_from(">I", data, place)
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)
    kbps_index, rate_index, padding = header >> 12 & 15, header >> 10 & 3, header >> 9 & 1
    is_header = header >> 21 == 0x7FF and version != 1 and layer != 4 and rate_index != 3
    if not is_header or not 0 < kbps_index < 15:
        return None
    kbps = (_KBPS if version == 3 else _LSF)[layer - 1][kbps_index - 1]
    rate_hz = _RATES_HZ[version][rate_index]
    if layer == 1:
        return (12_000 * kbps // rate_hz + padding) * 4
    per_byte = 72_000 if layer == 3 and version != 3 else 144_000
    return per_byte * kbps // rate_hz + padding


def hidden_start(source: BufferedIOBase) -> int | None:
    """Where the first frame of a file is, if FFmpeg would not look there for its Xing frame.

    None if the first frame opens the file or follows its ID3v2 tags, or if no frame is found.
    """
    tags_end = place = _behind_id3(source, 0)
    while (end := _behind_ape(source, place)) > place:
        place = _behind_id3(source, end)
    source.seek(place)
    data = source.read(_SEARCHED_BYTES)
    at = data.find(0xFF)
    while at >= 0:
        if _is_start(data, at, is_expected=place + at == tags_end):
            return place + at if place + at != tags_end else None
        at = data.find(0xFF, at + 1)
    return None


def is_tagged(source: BufferedIOBase) -> bool:
    """Whether a file opens with an ID3v2 or APE tag."""
    return _behind_id3(source, 0) > 0 or _behind_ape(source, 0) > 0


def _is_start(data: bytes, place: int, *, is_expected: bool) -> bool:
    """Whether frames of one kind follow each other from a place on, or up to the end."""
    kind, head = _kind(data, place), data[place : place + _ENCODER_HEADER_ENDS]
    is_expected = is_expected or any(name in head for name in _ENCODER_HEADERS)
    for number in range(_SURE_CHAIN if is_expected else _CHAIN):
        size = frame_bytes(data, place)
        if size is None or _kind(data, place) != kind:
            is_end = len(data) - place < HEADER_BYTES or data.startswith(_TRAILERS, place)
            return number > 1 and is_end
        place += size
    return True


def _kind(data: bytes, place: int) -> bytes:
    """What the headers of a file have in common: version, layer and sample rate."""
    return bytes([data[place + 1] & 0xFE, data[place + 2] & 0x0C]) if place + 2 < len(data) else b""


def _behind_id3(source: BufferedIOBase, place: int) -> int:
    """The end of the ID3v2 tags that begin at a place."""
    while True:
        source.seek(place)
        head = source.read(10)
        if len(head) < 10 or not head.startswith(b"ID3") or max(head[6:]) > 127:
            return place
        footer = 10 if head[5] & 0x10 else 0
        place += 10 + footer + sum(byte << 7 * (3 - n) for n, byte in enumerate(head[6:]))


def _behind_ape(source: BufferedIOBase, place: int) -> int:
    """The end of the APE tag that begins at a place, with a header or with items alone."""
    source.seek(place)
    head = source.read(32)
    if len(head) < 32 or not head.startswith(b"APETAGEX"):
        return place
    size = struct.unpack_from("<I", head, 12)[0]  # of the items and the footer
    return place + 32 + size
