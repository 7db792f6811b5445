"""Several FLAC or Ogg files joined into one, as `cat a.flac b.flac` makes it.

libsndfile reads the first one alone. FFmpeg loses the last frame of a FLAC before each joint (0.256
s at 16 kHz), as what follows makes its checksum wrong, and all of an Opus behind one that is a
single page. So each is read as a file of its own.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from speechlm2_jax.data.audio_errors import AudioError

_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
"""The mark of a FLAC and the header of STREAMINFO, its first block, of 34 bytes (RFC 9639)."""
_OGG = re.compile(rb"OggS\x00[\x02\x06]")
"""The mark of a page of Ogg that begins a stream (RFC 3533)."""
_OGG_HEADER_BYTES = 27


def joined_starts(data: Any, form: str) -> list[int]:
    """Where each of the files begins that are joined in some bytes; `form` is FLAC or OGG."""
    mark = b"fLaC" if form == "FLAC" else b"OggS\x00\x02"
    if data.find(mark, 1) < 0:  # ten times as fast
        return [0]
    if form == "FLAC":
        return [match.start() for match in _FLAC.finditer(data)]
    starts, after = list[int](), -1
    for match in _OGG.finditer(data):
        if match.start() != after:  # else another stream of the same file
            starts.append(match.start())
        after = _end_of_page(data, match.start())
    return starts


def _end_of_page(data: Any, start: int) -> int:
    body = start + _OGG_HEADER_BYTES
    segments = data[body - 1] if body <= len(data) else 0
    return body + segments + sum(data[body : body + segments])


class JoinedFiles:
    """Open recordings of one sample rate, one after another (an `AudioFile`).

    Raises AudioError where the rate changes.
    """

    def __init__(self, parts: Sequence[Any], name: str) -> None:
        self._parts = parts
        rates = [part.rate_hz for part in parts]
        if len(set(rates)) > 1:
            self.close()
            other = next(rate for rate in rates if rate != rates[0])
            raise AudioError(
                f"{name}: the sample rate changes from {rates[0]} to {other} Hz inside the file",
                cause="unreadable",
            )
        self.rate_hz: int = rates[0]
        self.is_lossy = any(part.is_lossy for part in parts)
        self.is_integer = all(part.is_integer for part in parts)
        self.is_complete = all(part.is_complete for part in parts)

    @property
    def frames(self) -> int | None:
        """Samples per channel by the headers; None if one of them does not tell."""
        counts = [part.frames for part in self._parts]
        return None if None in counts else sum(counts)

    def blocks(self, start: int, count: int | None) -> Iterator[np.ndarray]:
        """Yields samples [n, C] from `start` on, `count` of them or up to the end of the file."""
        for part in self._parts:
            if part.frames is not None and start >= part.frames:
                start -= part.frames
                continue
            begin = 0 if part.frames is None else start
            start -= begin
            for block in part.blocks(begin, None):
                skipped = min(start, len(block))
                start -= skipped
                block = block[skipped:] if count is None else block[skipped : skipped + count]
                if len(block):
                    yield block
                count = None if count is None else count - len(block)
                if count == 0:
                    return

    def length(self) -> int:
        """Samples per channel that can be read."""
        return sum(part.length() for part in self._parts)

    def close(self) -> None:
        """Closes all."""
        for part in self._parts:
            part.close()
