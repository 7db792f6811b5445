"""Spectrograms: the right place lights up, the palette is even, the PNG can be read."""

import struct
import zlib

import numpy as np
import pytest

from speechlm2_jax.evaluation.html_report.spectrogram import (
    COLOURS,
    MAX_PIXELS,
    MEL_BINS,
    PIXELS_PER_S,
    log_mel_db,
    palette,
    spectrogram_png,
)

RATE_HZ = 16_000


def _decode(data):
    """Pixels [H, W] and colours [C, 3] of a palette PNG without filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        (crc,) = struct.unpack(">I", data[place + 8 + size : place + 12 + size])
        assert crc == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert chunks[b"IHDR"][8:] == bytes([8, 3, 0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)


def test_time_runs_right_and_frequency_up():
    time_s = np.arange(RATE_HZ) / RATE_HZ
    low = np.where(time_s < 0.5, np.sin(2 * np.pi * 400 * time_s), 0)
    high = np.where(time_s >= 0.5, np.sin(2 * np.pi * 5000 * time_s), 0)
    pixels, colours = _decode(spectrogram_png((low + high).astype(np.float32), RATE_HZ))
    assert pixels.shape == (MEL_BINS, PIXELS_PER_S)
    assert len(colours) == COLOURS
    first, second = pixels[:, 20].argmax(), pixels[:, 60].argmax()
    assert first > 60, "a low tone is near the bottom"
    assert second < 20, "a high one near the top"


def test_levels_are_true_decibels():
    wave = np.random.default_rng(0).normal(size=RATE_HZ).astype(np.float32) / 10
    quiet, loud = log_mel_db(wave, RATE_HZ), log_mel_db(10 * wave, RATE_HZ)
    np.testing.assert_allclose(loud - quiet, 20, atol=1e-2)


def test_silence_is_dark_rather_than_amplified():
    pixels, _ = _decode(spectrogram_png(np.zeros(RATE_HZ, np.float32), RATE_HZ))
    assert pixels.max() < COLOURS // 2


@pytest.mark.parametrize("samples", [1, 100, 16_000, 60 * 16_000])
def test_any_length_gives_a_picture_of_bounded_width(samples):
    pixels, _ = _decode(spectrogram_png(np.ones(samples, np.float32) / 2, RATE_HZ))
    assert 1 <= pixels.shape[1] <= MAX_PIXELS


def test_the_palette_is_even_in_lightness_and_starts_dark():
    # CIE 1976 lightness of sRGB, by its definition: another space than the one it was made in
    srgb = palette() / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    lightness = np.where(
        luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27
    )
    steps = np.diff(lightness)
    assert lightness[0] < 8
    assert lightness[-1] > 92
    assert steps.min() > 0
    assert steps.max() < 3 * np.median(steps)
