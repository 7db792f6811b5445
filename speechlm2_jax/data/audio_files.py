"""Opens audio files: libsndfile where it reads a file to its end, FFmpeg for all others.

libsndfile guesses the length of an MP3, stops at the first of several files joined into one, and
takes a length that was never written for none: such files go to FFmpeg, or get their length.
"""

import mmap
import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedIOBase, BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.ffmpeg import FfmpegFile
from speechlm2_jax.data.joined_audio import JoinedFiles, joined_starts

RATES_HZ = (1_000, 768_000)
"""Lowest and highest sample rate: of others headers are wrong, and resampling would need filters or
arrays of absurd sizes."""
_BLOCK_VALUES = 1 << 22
_SAMPLES_PER_BYTE = 8192
"""A FLAC of digital silence holds so many, and nothing holds more."""
_LOSSY = ("VORBIS", "OPUS", "GSM610", "NMS_ADPCM", "G721", "G723")
_JOINED = {b"fLaC": "FLAC", b"OggS": "OGG"}
"""First bytes -> libsndfile's name of a format of which several files may be joined into one."""
_UNLIMITED = b"\xff" * 4
_UNKNOWN_LENGTH = 0xFFFFFFFF
_CHUNK_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_ ]{3}")
_CHUNKS_BEHIND_SAMPLES = frozenset(
    name.ljust(4).encode()
    for name in "LIST INFO id3 ID3 bext iXML aXML axml _PMX cue plst smpl inst fact PEAK cart acid "
    "strc afsp levl chna umid minf elm1 regn ovwf DISP DGDA SAUR ResU JUNK junk PAD FLLR".split()
)
_LONGEST_CHUNK_BYTES = 1 << 20
"""Of those that are looked for behind samples."""
_MAGIC_BYTES, _HEAD_BYTES = 16, 1 << 16


@runtime_checkable
class AudioFile(Protocol):
    """An open recording."""

    rate_hz: int
    is_lossy: bool
    """Whether its length may differ by the delay of an encoder, from one tool to the next."""
    is_integer: bool
    """Whether it holds samples as integers, so none is NaN or infinite."""
    is_complete: bool
    """Whether a header tells its length, and as much is there."""

    @property
    def frames(self) -> int | None:
        """Samples per channel by a header that can be believed; None: what decodes counts."""

    def blocks(self, start: int, count: int | None) -> Iterator[np.ndarray]:
        """Yields samples [n, C] from `start` on, `count` of them or up to the end of the file."""
        ...

    def length(self) -> int:
        """Samples per channel that can be read."""
        ...

    def close(self) -> None:
        """Frees memory and closes what was opened for it."""
        ...


@contextmanager
def open_audio(
    source: str | Path | BufferedIOBase, *, end_s: float | None = None
) -> Iterator[AudioFile]:
    """Opens a recording for reading up to `end_s`, or to its end.

    Raises AudioError for a file that is missing or cannot be read.
    """
    name = str(source)
    with ExitStack() as stack:
        if isinstance(source, str | Path):
            raw = stack.enter_context(open_binary(source))
        else:
            raw = source = source if source.seekable() else BytesIO(source.read())
        file = _choose(source, raw, name, end_s)
        stack.callback(file.close)
        least, most = RATES_HZ
        if not least <= file.rate_hz <= most:
            raise AudioError(
                f"{name}: the header has a sample rate of {file.rate_hz} Hz; rates from {least} "
                f"to {most} Hz are read",
                cause="unreadable",
            )
        yield file


def open_binary(path: str | Path) -> BufferedIOBase:
    """Opens a file for reading. Raises AudioError for one that is missing or cannot be opened."""
    if not os.path.isfile(path):  # False, too, for a name that no file system could hold
        raise AudioError(f"{path}: no such file", cause="missing")
    if (shown := shown_path(path)) != str(path):  # libsndfile is given UTF-8
        raise AudioError(f"{shown}: its name is not UTF-8; rename it", cause="unreadable")
    try:
        return open(path, "rb")
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror}", cause="unreadable") from error


def shown_path(path: str | Path) -> str:
    r"""A path as a message has it: bytes that are not UTF-8 are escaped, as in `bad\xff.ogg`."""
    name = str(path)
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def _choose(
    source: str | Path | BufferedIOBase, raw: BufferedIOBase, name: str, end_s: float | None
) -> AudioFile:
    import soundfile

    raw.seek(0)
    head, size = _head(raw), raw.seek(0, os.SEEK_END)
    raw.seek(0)
    if _is_mpeg(head):
        return FfmpegFile(raw, name)
    file: _Soundfile | JoinedFiles | None = None
    is_empty = False
    try:
        file = _Soundfile(source, name)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a headerless format
        reason = getattr(error, "error_string", str(error))
    else:
        reason, is_empty = "the length is not known", not file.frames
        if not file.is_exact(raw, size, end_s):
            file.close()
            form = next((form for mark, form in _JOINED.items() if head.startswith(mark)), None)
            file = None if form is None else _joined(raw, name, form)
    if (whole := _with_length(head, raw, size, is_read=file is not None)) is not None:
        with suppress(soundfile.SoundFileError):  # of a damaged header
            file = _Soundfile(whole, name)
    if file is not None:
        file.is_complete &= not _ends_early(head, size)
        return file
    try:
        if is_empty and head.startswith((b"RIFF", b"RF64", b".snd")):
            raise AudioError(f"{name}: no samples", cause="empty")
        return FfmpegFile(raw, name)
    except AudioError as error:
        if is_empty:
            raise AudioError(f"{name}: no samples", cause="empty") from error
        raise AudioError(f"{error} (libsndfile: {reason})", cause="unreadable") from error


def _joined(raw: BufferedIOBase, name: str, form: str) -> JoinedFiles | None:
    """The files that are joined into one; None if it is but one."""
    with _whole(raw) as data:
        starts = joined_starts(data, form)
        if len(starts) < 2:
            return None
        pieces = [BytesIO(data[a:b]) for a, b in pairwise([*starts, len(data)])]
    parts: list[AudioFile] = []
    try:
        for piece in pieces:
            parts.append(_choose(piece, piece, name, None))
        return JoinedFiles(parts, name)
    except BaseException:
        for part in parts:
            part.close()
        raise


class _Soundfile:
    """A file that libsndfile reads."""

    def __init__(self, source: str | Path | BufferedIOBase, name: str) -> None:
        import soundfile

        anything: Any = source  # soundfile's own annotation leaves out open files
        self._file, self._name = soundfile.SoundFile(anything), name
        self._error = soundfile.SoundFileError
        self.rate_hz = self._file.samplerate
        self.is_lossy = self._file.subtype.startswith(_LOSSY)
        self.is_integer = self._file.subtype.startswith("PCM_")
        self.is_complete = True

    @property
    def frames(self) -> int | None:
        """Samples per channel by the header."""
        return self._file.frames

    def close(self) -> None:
        """Closes the file, but not one that was given open."""
        self._file.close()

    def is_exact(self, raw: BufferedIOBase, size: int, end_s: float | None) -> bool:
        """Whether it can be read here up to `end_s`: not where the length is but a guess.

        `raw` is the file of `size` bytes.
        """
        frames = self._file.frames
        if self._file.subtype.startswith("MPEG") or not 0 < frames <= size * _SAMPLES_PER_BYTE:
            return False
        form = self._file.format
        is_enough = end_s is not None and end_s * self.rate_hz < frames
        if form not in _JOINED.values() or is_enough:
            return True
        with _whole(raw) as data:
            return len(joined_starts(data, form)) < 2

    def blocks(self, start: int, count: int | None) -> Iterator[np.ndarray]:
        """Yields samples [n, C] from `start` on, `count` of them or up to the end of the file."""
        size = max(_BLOCK_VALUES // self._file.channels, 1)
        left = self._file.frames - start if count is None else count
        try:
            if start:
                self._file.seek(min(start, self._file.frames))
            while left > 0:
                block = self._file.read(min(size, left), dtype="float32", always_2d=True)
                if len(block):
                    yield block
                if len(block) < min(size, left):
                    return
                left -= len(block)
        except self._error as error:
            raise AudioError(f"{self._name}: {error}", cause="unreadable") from error

    def length(self) -> int:
        """Samples per channel by the header; reading tells where a file ends before."""
        return self._file.frames


def _head(raw: BufferedIOBase) -> bytes:
    """The first bytes: of the formats whose header is looked at, all of it."""
    head = raw.read(_MAGIC_BYTES)
    is_looked_at = head.startswith((b"RIFF", b"RF64", b".snd"))
    return head + raw.read(_HEAD_BYTES) if is_looked_at else head


def _is_mpeg(head: bytes) -> bool:
    """Whether a file opens with an ID3 tag or an MPEG audio frame of layer I, II or III."""
    is_frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06
    return head.startswith(b"ID3") or bool(is_frame)


@contextmanager
def _whole(raw: BufferedIOBase) -> Iterator[mmap.mmap | bytes]:
    """All bytes of a file, mapped into memory where it is one of the operating system."""
    try:
        view = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        place = raw.tell()
        raw.seek(0)
        data = raw.read()
        raw.seek(place)
        yield data
    else:
        with view:
            yield view


def _with_length(head: bytes, raw: BufferedIOBase, size: int, *, is_read: bool) -> BytesIO | None:
    """A WAV, RF64 or AU whose writer left its length open, with one; None for another file.

    Recorders that are cut off, and programs that write to a pipe, leave 0 or a length beyond the
    end of the file. Chunks behind the samples, which libsndfile would read as samples, are cut off;
    `is_read`: libsndfile reads the file to its end, so None if there are no such chunks.
    """
    is_au, place = head.startswith(b".snd"), _length_place(head)
    if place is None or not _ends_early(head, size):
        return None
    first = int.from_bytes(head[4:8], "big") if is_au else place + 4
    with _whole(raw) as data:
        end = len(data) if is_au else _samples_end(data, first)
        if end <= first or (is_read and end == len(data)):
            return None
        copy = bytearray(data[:end])
    copy[place : place + 4] = _UNLIMITED
    if head.startswith(b"RF64"):
        copy[:4], copy[12:16] = b"RIFF", b"JUNK"
    return BytesIO(copy)


def _length_place(head: bytes) -> int | None:
    """Where the header of a WAV, RF64 or AU gives the length of its samples."""
    return 8 if head.startswith(b".snd") else _wav_length_place(head)


def _ends_early(head: bytes, size: int) -> bool:
    """Whether a WAV, RF64 or AU has fewer samples than its header tells, or tells no length."""
    is_au, place = head.startswith(b".snd"), _length_place(head)
    if place is None:
        return False
    declared = int.from_bytes(head[place : place + 4], "big" if is_au else "little")
    first = int.from_bytes(head[4:8], "big") if is_au else place + 4
    return not declared or first + _long_length(head, declared) > size


def _wav_length_place(head: bytes) -> int | None:
    """Where a WAV header gives the length of its samples."""
    if not head.startswith((b"RIFF", b"RF64")) or head[8:12] != b"WAVE":
        return None
    place = 12
    while place + 8 <= len(head) and head[place : place + 4] != b"data":
        place += 8 + (struct.unpack_from("<I", head, place + 4)[0] + 1 & ~1)
    return place + 4 if place + 8 <= len(head) else None


def _long_length(head: bytes, declared: int) -> int:
    """The length of the samples, which an RF64 gives in its chunk ds64 if it is a long one."""
    if declared != _UNKNOWN_LENGTH or not head.startswith(b"RF64") or head[12:16] != b"ds64":
        return declared
    return int.from_bytes(head[28:36], "little") or _UNKNOWN_LENGTH


def _samples_end(data: mmap.mmap | bytes, first: int) -> int:
    """Where the samples of a WAV that begin at `first` end: at chunks up to its end, if any."""
    if _is_chunks(data, first):
        return first
    end = len(data)
    while (start := _chunk_before(data, first, end)) is not None:
        end = start
    return end


def _chunk_before(data: mmap.mmap | bytes, first: int, end: int) -> int | None:
    """Where the known chunk begins that ends at `end`."""
    low = first + max(end - first - _LONGEST_CHUNK_BYTES, 0) // 2 * 2
    words = np.frombuffer(data[low:end], "<u2", (end - low) // 2).astype(np.int64)
    sizes = words[2:-1] + (words[3:] << 16)
    places = low + 2 * np.arange(len(sizes))
    is_last = places + 8 + (sizes + 1 & ~1) == end + (end - first) % 2
    for place in places[is_last].tolist():
        if data[place : place + 4] in _CHUNKS_BEHIND_SAMPLES:
            return place
    return None


def _is_chunks(data: mmap.mmap | bytes, place: int) -> bool:
    """Whether well-formed chunks, and no samples, follow to the end of a WAV."""
    while place + 8 <= len(data) and _CHUNK_NAME.match(data, place):
        place += 8 + (struct.unpack_from("<I", data, place + 4)[0] + 1 & ~1)
    return place >= len(data)
