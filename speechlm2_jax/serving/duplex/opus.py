"""Streams of Ogg Opus: bytes as they come to samples, and samples to bytes."""

import secrets
import struct

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.error import FFmpegError
from jaxtyping import Float

from speechlm2_jax.serving.duplex.ogg import FIRST, OggError, OggReader, OggWriter

RATE_HZ = 24_000
"""Of what is encoded."""
GRANULE_HZ = 48_000
"""Of positions in a stream, and of what the decoder gives for any stream."""
FRAME_SAMPLES = RATE_HZ // 50
"""Samples of a packet: 20 ms."""
VENDOR = b"speechlm2_jax"
HEAD = struct.Struct("<8sBBHIhB")
"""Magic, version, channels, samples of 48 kHz to skip, rate, gain, mapping."""


class OpusWriter:
    """Encodes samples as they come. A packet of 20 ms is a page of its own."""

    def __init__(self) -> None:
        codec = av.CodecContext.create("libopus", "w")
        assert isinstance(codec, AudioCodecContext)
        codec.sample_rate, codec.layout, codec.format = RATE_HZ, "mono", "flt"
        codec.options = {"application": "voip", "frame_duration": "20", "compression_level": "5"}
        codec.bit_rate = 48_000
        codec.open()
        self._codec, self._pages = codec, OggWriter(secrets.randbits(32))
        self._held = np.zeros(0, np.float32)
        extra = codec.extradata
        assert extra is not None
        self._head = bytes(extra)
        self._granule = HEAD.unpack_from(self._head)[3]
        self._is_begun = False

    def push(self, samples: Float[np.ndarray, " S"]) -> bytes:
        """Takes samples [S] at 24 kHz within [-1, 1]; returns the pages that they complete."""
        pages = [] if self._is_begun else self._headers()
        self._held = np.concatenate([self._held, samples.astype(np.float32)])
        while len(self._held) >= FRAME_SAMPLES:
            piece, self._held = self._held[:FRAME_SAMPLES], self._held[FRAME_SAMPLES:]
            frame = av.AudioFrame.from_ndarray(piece[None], format="flt", layout="mono")
            frame.sample_rate = RATE_HZ
            for packet in self._codec.encode(frame):
                self._granule += FRAME_SAMPLES * GRANULE_HZ // RATE_HZ
                pages.append(self._pages.page(bytes(packet), self._granule))
        return b"".join(pages)

    def _headers(self) -> list[bytes]:
        self._is_begun = True
        tags = b"OpusTags" + struct.pack("<I", len(VENDOR)) + VENDOR + struct.pack("<I", 0)
        return [self._pages.page(self._head, 0, FIRST), self._pages.page(tags, 0)]


class OpusReader:
    """Decodes bytes as they come.

    The samples that a stream's header tells to skip (6.5 ms of silence) are kept: without them a
    chunk would end within a packet, and wait for the next one.
    """

    def __init__(self) -> None:
        self._packets = OggReader()
        self._codec: AudioCodecContext | None = None
        self._has_tags = False

    def push(self, data: bytes) -> Float[np.ndarray, " S"]:
        """Takes the next bytes; returns the samples [S] at GRANULE_HZ that they complete.

        Raises OggError for bytes that are no mono or stereo Ogg Opus; stereo is mixed.
        """
        found = [self._read(packet) for packet in self._packets.push(data)]
        return np.concatenate([np.zeros(0, np.float32), *found])

    def _read(self, packet: bytes) -> Float[np.ndarray, " S"]:
        none = np.zeros(0, np.float32)
        if packet[:8] == b"OpusHead":
            self._open(packet)
            return none
        if self._codec is None:
            raise OggError("no Opus stream: its header is missing")
        if not self._has_tags:
            self._has_tags = True
            if packet[:8] == b"OpusTags":
                return none
        if not packet:
            return none
        try:
            frames = self._codec.decode(av.Packet(packet))
        except (FFmpegError, ValueError) as error:
            raise OggError(f"a damaged Opus packet: {error}") from error
        return np.concatenate([none, *(_mono(frame) for frame in frames)])

    def _open(self, head: bytes) -> None:
        if len(head) < HEAD.size:
            raise OggError("the header of the Opus stream is too short")
        _, version, channels, _, _, _, mapping = HEAD.unpack_from(head)
        if version >> 4 or channels not in (1, 2) or mapping:
            raise OggError("only mono and stereo Opus streams are supported")
        codec = av.CodecContext.create("libopus", "r")
        assert isinstance(codec, AudioCodecContext)
        codec.sample_rate, codec.layout = GRANULE_HZ, "mono" if channels == 1 else "stereo"
        codec.open()
        self._codec, self._has_tags = codec, False


def _mono(frame: av.AudioFrame) -> Float[np.ndarray, " S"]:
    """The samples of a frame, whose format is the decoder's choice."""
    wave = frame.to_ndarray()
    if wave.dtype == np.int16:
        wave = wave / np.float32(1 << 15)
    if frame.format.is_planar:
        return wave.astype(np.float32).mean(0)
    return wave.astype(np.float32).reshape(-1, frame.layout.nb_channels).mean(1)
