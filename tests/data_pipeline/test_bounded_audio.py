"""Reading up to a limit: the samples of `read_audio`, in one pass, with little memory."""

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import audio_files, bounded_audio, ffmpeg
from speechlm2_jax.data.audio import AudioError, read_audio, resample
from speechlm2_jax.data.bounded_audio import TooLongAudio, read_bounded, resample_blocks

NOISE = np.random.default_rng(0).uniform(-1, 1, 30_000).astype(np.float32)


def file_of(wave, rate_hz, form="WAV", **more):
    file = BytesIO()
    soundfile.write(file, wave, rate_hz, format=form, **more)
    return file.getvalue()


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100, 48000, 11_111])
def test_blocks_of_any_size_are_resampled_bit_for_bit(rate_hz, monkeypatch):
    monkeypatch.setattr(bounded_audio, "_BLOCK_SAMPLES", 2000)
    expected = resample(NOISE, rate_hz, 16000)
    for size in (700, 3000, 30_000):
        blocks = [NOISE[n : n + size] for n in range(0, len(NOISE), size)]
        found = np.concatenate(list(resample_blocks(blocks, rate_hz, 16000)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_whole_recording_is_that_of_read_audio(form, monkeypatch):
    monkeypatch.setattr(bounded_audio, "_BLOCK_SAMPLES", 2000)
    data = file_of(np.stack([NOISE, NOISE[::-1] / 2], axis=1), 44100, form)
    expected = read_audio(BytesIO(data), sample_rate_hz=16000)
    found = read_bounded(BytesIO(data), sample_rate_hz=16000, max_s=5.0)
    np.testing.assert_array_equal(found, expected)


def test_a_recording_beyond_the_limit_is_told_by_its_header_or_given_up(monkeypatch):
    wave = np.zeros(48_000)
    whole = read_bounded(BytesIO(file_of(wave, 16000)), sample_rate_hz=8000, max_s=2.0)
    assert whole == TooLongAudio(3.0, True)
    some = read_bounded(BytesIO(file_of(wave, 16000, "MP3")), sample_rate_hz=8000, max_s=2.0)
    assert not some.is_whole and 2.0 < some.seconds < 2.2


@pytest.mark.parametrize("damage", ["truncated", "not_finite", "empty"])
def test_what_cannot_be_used_has_the_cause_of_read_audio(damage):
    own = {"empty": NOISE[:0], "not_finite": np.full(100, np.nan)}.get(damage, NOISE)
    form = dict(form="FLAC") if damage == "truncated" else dict(subtype="FLOAT")
    data = file_of(own, 16000, **form)
    data = data[:-4000] if damage == "truncated" else data
    with pytest.raises(AudioError) as expected:
        read_audio(BytesIO(data), sample_rate_hz=8000)
    with pytest.raises(AudioError) as found:
        read_bounded(BytesIO(data), sample_rate_hz=8000, max_s=5.0)
    assert found.value.cause == expected.value.cause


def test_silence_at_a_high_rate_takes_the_memory_of_the_wanted_rate(monkeypatch):
    monkeypatch.setattr(bounded_audio, "_BLOCK_SAMPLES", 1 << 16)
    monkeypatch.setattr(audio_files, "_BLOCK_VALUES", 1 << 16)
    data = file_of(np.zeros(40 * 192_000, np.int16), 192_000, "FLAC")
    tracemalloc.start()
    wave = read_bounded(BytesIO(data), sample_rate_hz=16000, max_s=60.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(wave) == 40 * 16000 and len(data) < 1 << 20
    assert peak < 4 * wave.nbytes < 40 * 192_000 * 4 / 2  # half of one copy at the file's rate


def test_a_sample_format_that_numpy_lacks_is_an_unusable_recording(monkeypatch):
    def fail(frame):
        raise ValueError("no conversion")

    data = file_of(NOISE, 16000, "MP3")
    monkeypatch.setattr(ffmpeg, "_samples", fail)
    with pytest.raises(AudioError, match="no conversion"):
        read_bounded(BytesIO(data), sample_rate_hz=16000, max_s=5.0)
