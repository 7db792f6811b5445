"""Spectrograms as PNG: log-mel energies in a perceptually uniform palette."""

import struct
import zlib
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8

from speechlm2_jax.perception.mel_filterbank import analysis_window, mel_filterbank

MEL_BINS = 80
WINDOW_S = 0.025
PIXELS_PER_S = 80
MAX_PIXELS = 1600
"""Longer recordings get a longer hop, so that the image stays small."""
RANGE_DB = 65.0
"""Dynamic range below the maximum."""
COLOURS = 64


def spectrogram_png(wave: Float[np.ndarray, " S"], sample_rate_hz: int) -> bytes:
    """Draws [S] samples as a PNG: time to the right, mel bins upwards, loud is light."""
    decibels = log_mel_db(wave, sample_rate_hz)
    # a floor at digital silence: an empty recording is dark, not noise at full contrast
    top = max(float(decibels.max()), -60.0)
    shade = np.clip(1 + (decibels - top) / RANGE_DB, 0, 1)
    return png(np.round(shade * (COLOURS - 1)).astype(np.uint8)[::-1], palette())


def log_mel_db(wave: Float[np.ndarray, " S"], sample_rate_hz: int) -> Float[np.ndarray, "M T"]:
    """Mel energies [M, T] of [S] samples in decibels, one frame per pixel."""
    size = round(WINDOW_S * sample_rate_hz)
    n_fft = 1 << (size - 1).bit_length()
    pixels = int(np.clip(round(len(wave) / sample_rate_hz * PIXELS_PER_S), 1, MAX_PIXELS))
    starts = np.linspace(0, len(wave), pixels, endpoint=False).astype(int)
    padded = np.pad(wave, (size // 2, size))
    frames = padded[starts[:, None] + np.arange(size)] * analysis_window("hann", size)
    power = np.abs(np.fft.rfft(frames, n_fft)) ** 2
    energies = _filters(sample_rate_hz, n_fft) @ power.T
    return (10 * np.log10(energies + 1e-10)).astype(np.float32)


@lru_cache
def _filters(sample_rate_hz: int, n_fft: int) -> Float[np.ndarray, "M F"]:
    return mel_filterbank(
        sample_rate_hz=sample_rate_hz,
        n_fft=n_fft,
        bins=MEL_BINS,
        low_hz=0.0,
        high_hz=sample_rate_hz / 2,
        area_normalised=True,
    )


@lru_cache
def palette() -> UInt8[np.ndarray, "C 3"]:
    """Colours from dark violet over red to pale yellow.

    Lightness rises in equal steps of OKLab (Ottosson 2020): equal steps of level look equal, also
    to those who do not see the hues, and in a black and white print.
    """
    level = np.linspace(0, 1, COLOURS)
    lightness = 0.16 + 0.81 * level
    chroma = 0.02 + 0.17 * np.sin(np.pi * level**0.9) ** 0.8
    hue = np.radians(290 + 185 * level)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = _oklab_to_linear_rgb(lab)
    encoded = np.where(
        linear <= 0.0031308,
        12.92 * linear,
        1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055,
    )
    return np.round(np.clip(encoded, 0, 1) * 255).astype(np.uint8)


def png(pixels: UInt8[np.ndarray, "H W"], colours: UInt8[np.ndarray, "C 3"]) -> bytes:
    """Writes indices [H, W] into a palette [C, 3] as a PNG (ISO/IEC 15948)."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()  # each row begins with filter type 0
    chunks = ((b"IHDR", header), (b"PLTE", colours.tobytes()), (b"IDAT", zlib.compress(rows, 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*c) for c in (*chunks, (b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _oklab_to_linear_rgb(lab: np.ndarray) -> np.ndarray:
    """OKLab -> linear sRGB, by the matrices of the colour space's definition."""
    to_cones = np.array(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    return (lab @ to_cones.T) ** 3 @ to_rgb.T
