"""Makes recordings of every format: by libsndfile, and by FFmpeg into a file or a pipe."""

from pathlib import Path

import av
import numpy as np

RATE_HZ = 16_000


def speechlike(seconds: float = 2.0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Tones below 3.4 kHz whose loudness changes, so that a variable bit rate varies; [S]."""
    at = np.arange(round(seconds * rate_hz)) / rate_hz
    tones = sum(np.sin(2 * np.pi * hz * at) / n for n, hz in enumerate((210, 700, 1900), start=1))
    return (0.2 * tones * np.sin(np.pi * at / seconds) ** 2).astype(np.float32)


class Pipe:
    """Takes bytes and cannot seek, as a pipe: lengths in headers stay unknown."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data) -> int:
        """Appends."""
        self.data += bytes(data)
        return len(data)


def encode(
    path: Path,
    waves: np.ndarray,
    *,
    rate_hz: int,
    container: str,
    codec: str,
    is_pipe: bool = False,
) -> Path:
    """Writes float32 [S], or stereo [S, 2], by FFmpeg."""
    planes = np.atleast_2d(waves.T)
    layout = "mono" if len(planes) == 1 else "stereo"
    pipe = Pipe()
    with av.open(pipe if is_pipe else str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate_hz, layout=layout)
        if codec == "wmav2":
            stream.bit_rate = 128_000
        whole = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(planes, np.float32), format="fltp", layout=layout
        )
        whole.sample_rate, whole.pts = rate_hz, 0
        for frame in [whole, None]:
            file.mux(stream.encode(frame))
    if is_pipe:
        path.write_bytes(pipe.data)
    return path


def correlation(wave: np.ndarray, source: np.ndarray) -> float:
    """How alike two recordings are without any shift: 1 is the same."""
    count = min(len(wave), len(source))
    return float(np.corrcoef(wave[:count], source[:count])[0, 1])


def delay(wave: np.ndarray, source: np.ndarray) -> int:
    """By how many samples a recording lies behind its source."""
    from scipy.signal import correlate

    found = correlate(wave, source, "full", "fft")
    return int(found.argmax()) - (len(source) - 1)


def without_first_frame(path: Path) -> None:
    """Takes the Xing or Info frame, the first, out of an MP3: streams have none."""
    data = path.read_bytes()
    assert b"Xing" in data[:200] or b"Info" in data[:200]
    second = data.index(data[:2], 40)
    path.write_bytes(data[second:])
