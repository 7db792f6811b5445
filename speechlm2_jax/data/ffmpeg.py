"""What FFmpeg decodes: MP3, to its true end, and what libsndfile does not read (AAC, WebM, ...).

PyAV brings FFmpeg in a wheel; it is imported only where such a file is opened.
"""

import errno
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from io import BufferedIOBase
from typing import Any

import numpy as np

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.mpeg_frames import frame_bytes, hidden_start, is_tagged

_DEMUXERS = (
    "aac ac3 aiff amr amrnb amrwb ape asf au avi caf eac3 flac flv gsm loas matroska mov mp2 mp3 "
    "mp4 mpc mpc8 mpeg mpegts nistsphere ogg shn tta voc w64 wav webm wv xwma"
)
"""No playlist among them: a file must not make FFmpeg open other files or addresses."""
_OPTIONS = {"format_whitelist": _DEMUXERS.replace(" ", ","), "protocol_whitelist": "file"}
_EXACT_TIMES = ("mp3", "mov,mp4,m4a,3gp,3g2,mj2")
_FINITE_MEMORY = ("mp3", "mp3float", "aac", "alac")
"""Containers whose packets say exactly which samples they hold, and decoders that forget: packets
before a segment need not be decoded."""
_PREROLL_S = 1
"""Decoded before a segment: longer than such decoders remember (MP3 refers back 511 bytes)."""
_LOSSLESS = ("pcm", "flac", "alac", "wavpack", "ape", "tta", "shorten", "wmalossless")


class _Seekable:
    """A file as FFmpeg wants it, from `start` on.

    An impossible place is a number, not an exception.
    """

    def __init__(self, source: BufferedIOBase, start: int) -> None:
        self.read, self._source, self._start = source.read, source, start
        source.seek(start)

    def tell(self) -> int:
        """The place, counted from `start`."""
        return self._source.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new place, or an error number below zero."""
        shift = self._start if whence == os.SEEK_SET else 0
        try:
            return self._source.seek(offset + shift, whence) - self._start
        except (OSError, ValueError):
            return -errno.EINVAL


class FfmpegFile:
    """The first audio stream of a file, decoded once, to its end whatever its header declares."""

    frames = None
    """What decodes is the length."""

    def __init__(self, source: BufferedIOBase, name: str) -> None:
        """Raises AudioError for what FFmpeg cannot read, and for a file without audio."""
        import av

        self._source, self._name = source, name
        self._errors = (av.FFmpegError, OSError, ValueError)
        try:
            self._container: Any = _opened(source)
        except self._errors as error:
            raise AudioError(f"{name}: {_reason(error)}", cause="unreadable") from error
        try:
            self._stream = self._first_audio_stream()
            self._packets, self._decoded = self._demux(), self._decode()
            self._longest = self._total = 0
            self._has_junk = False
            self._since: int | None = None
            self._first = self._first_frame()
        except BaseException:
            self.close()
            raise
        self.rate_hz, codec = self._first.sample_rate, self._stream.codec_context.name
        self.is_lossy = not codec.startswith(_LOSSLESS)
        self.is_integer = self.is_complete = False  # as far as is known
        ticks = Fraction(1, self.rate_hz) / self._stream.time_base
        is_exact = self._container.format.name in _EXACT_TIMES and codec in _FINITE_MEMORY
        is_exact = is_exact and ticks.denominator == 1 and self._first.pts is not None
        self._ticks = ticks.numerator if is_exact else None
        """Units of the time stamps per sample, where they are exact."""

    def close(self) -> None:
        """Frees FFmpeg's memory; `source` stays open."""
        self._container.close()

    def blocks(self, start: int, count: int | None) -> Iterator[np.ndarray]:
        """Yields samples [n, C] from `start` on, `count` of them or up to the end of the file."""
        stop = None if count is None else start + count
        for position, block in self._positioned(start):
            if stop is not None and position >= stop:
                return
            part = block[max(start - position, 0) : None if stop is None else stop - position]
            if len(part):
                yield part

    def length(self) -> int:
        """Samples that decode; of an MP3 by its packets, which takes a tenth of decoding."""
        if self._ticks is None or self._container.format.name != "mp3":
            return sum(map(len, self.blocks(0, None)))
        for _ in self._packets:
            pass
        skipped, declared = self._stream.start_time or 0, self._stream.duration or 0
        if not skipped and not self._has_junk:  # the file does not declare its encoder padding
            return self._total // self._ticks
        is_declared = 0 <= self._total - skipped - declared < 3 * self._longest
        if is_declared and not self._has_junk:
            return declared // self._ticks
        again = FfmpegFile(self._source, self._name)
        try:
            return sum(map(len, again.blocks(0, None)))
        finally:
            again.close()

    def _first_audio_stream(self) -> Any:
        streams = self._container.streams
        if not streams.audio:
            kinds = ", ".join(sorted({stream.type for stream in streams})) or "nothing"
            raise AudioError(f"{self._name}: no audio stream, only {kinds}", cause="unreadable")
        if streams.audio[0].codec_context is None:
            raise AudioError(f"{self._name}: its codec is not supported", cause="unreadable")
        return streams.audio[0]

    def _first_frame(self) -> Any:
        first = next(self._decoded, None)
        if first is None:
            raise AudioError(f"{self._name}: no samples", cause="empty")
        return first

    def _positioned(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Decoded frames [n, C] behind the number of the first sample of each."""
        origin, position = self._first.pts, 0
        is_skipping = self._ticks is not None and start > _PREROLL_S * self.rate_hz
        if is_skipping:
            self._since = origin + (start - _PREROLL_S * self.rate_hz) * self._ticks
        for frame in itertools.chain([self._first], self._decoded):
            if frame.sample_rate != self.rate_hz:
                raise AudioError(
                    f"{self._name}: the sample rate changes from {self.rate_hz} to "
                    f"{frame.sample_rate} Hz inside the file",
                    cause="unreadable",
                )
            if is_skipping and frame.pts is not None:
                position = (frame.pts - origin) // self._ticks
            yield position, self._samples(frame)
            position += frame.samples

    def _samples(self, frame: Any) -> np.ndarray:
        """The samples of a decoded frame as float32 [n, C]."""
        try:
            return _samples(frame)
        except self._errors as error:  # of a sample format that NumPy has no type for
            raise AudioError(f"{self._name}: {_reason(error)}", cause="unreadable") from error

    def _decode(self) -> Iterator[Any]:
        """Decodes packets, but for those that end before the time stamp `_since`.

        Damaged packets are left out, as players do: the length shows what is missing.
        """
        for packet in self._packets:
            if self._is_before(packet):
                continue
            try:
                yield from self._stream.codec_context.decode(packet)
            except self._errors:
                continue

    def _is_before(self, packet: Any) -> bool:
        if self._since is None or packet.pts is None:
            return False
        return packet.pts + (packet.duration or 0) < self._since

    def _demux(self) -> Iterator[Any]:
        is_mp3 = self._container.format.name == "mp3"
        try:
            for packet in self._container.demux(self._stream):
                self._total += packet.duration or 0
                self._longest = max(self._longest, packet.duration or 0)
                self._has_junk = self._has_junk or (is_mp3 and _is_junk(packet))
                yield packet
        except self._errors as error:
            raise AudioError(f"{self._name}: {_reason(error)}", cause="unreadable") from error


def _opened(source: BufferedIOBase) -> Any:
    """FFmpeg's container of a file; of an MP3 from its first frame on, if tags or junk hide that.

    Behind a long tag FFmpeg does not even see that a file is an MP3.
    """
    import av

    def container(start: int) -> Any:
        file: Any = _Seekable(source, start)
        return av.open(file, mode="r", options=_OPTIONS)

    try:
        found = container(0)
    except av.FFmpegError:
        start = hidden_start(source) if is_tagged(source) else None
        if start is None:
            raise
        return container(start)
    place = source.tell()  # FFmpeg reads on from here
    if found.format.name == "mp3" and (start := hidden_start(source)) is not None:
        found.close()
        return container(start)
    source.seek(place)
    return found


def _is_junk(packet: Any) -> bool:
    """Whether a packet of an MP3 does not open with a whole frame: it may decode to nothing."""
    size = frame_bytes(bytes(packet)) if packet.size else 0
    return size is None or size > packet.size


def _samples(frame: Any) -> np.ndarray:
    """The samples of a decoded frame as float32 [n, C]."""
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(frame.samples, -1)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if np.issubdtype(array.dtype, np.integer):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    return array.astype(np.float32, copy=False)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
