"""Reading audio: samples are read as written, and unusable files are refused with the reason."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from speechlm2_jax.data.audio import (
    CAUSES,
    AudioError,
    check_samples,
    read_audio,
    resample,
    resampled_length,
    sinc_resample,
)

AUDIO = Path(__file__).parents[1] / "data" / "audio"
GOLDEN = AUDIO / "resample.safetensors"
SINC_GOLDEN = AUDIO / "sinc_resample.safetensors"
SINC_ATOL = 1e-5
PCM16_STEP = 1 / 32768


@pytest.fixture
def tone(tmp_path):
    path = tmp_path / "tone.wav"
    wave = (0.1 * np.sin(np.arange(16000) / 7)).astype(np.float32)
    soundfile.write(path, wave, 16000)
    return path, wave


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
def test_resampling_equals_lhotse_bit_for_bit(rate):
    golden = load_file(GOLDEN)
    out = resample(golden[f"in_{rate}"], rate, 16000)
    np.testing.assert_array_equal(out, golden[f"out_{rate}_to_16000"])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.sampled_from([8000, 11025, 16000, 44100]), st.integers(1, 48000))
def test_resampling_gives_the_length_that_was_promised(samples, from_hz, to_hz):
    wave = np.ones(samples, np.float32)
    assert len(resample(wave, from_hz, to_hz)) == resampled_length(samples, from_hz, to_hz)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"),
    [(16000, 22050), (22050, 16000), (24000, 16000), (44100, 22050), (8000, 16000)],
)
def test_sinc_resampling_equals_nemo(from_hz, to_hz):
    golden = load_file(SINC_GOLDEN)
    out = sinc_resample(golden["x"][0], from_hz, to_hz)
    np.testing.assert_allclose(out, golden[f"nemo_{from_hz}_{to_hz}"][0], atol=SINC_ATOL, rtol=0)


@given(st.integers(1, 3000), st.sampled_from([8000, 11025, 16000, 44100]), st.integers(1, 48000))
def test_sinc_resampling_keeps_a_constant_and_rounds_the_length_up(samples, from_hz, to_hz):
    out = sinc_resample(np.ones(samples, np.float32), from_hz, to_hz)
    assert len(out) == -(-samples * to_hz // from_hz)
    edge = -(-8 * max(from_hz, to_hz) // from_hz)
    assert np.abs(out[edge:-edge] - 1.0).max(initial=0.0) < 0.02


def test_resampling_to_the_same_rate_or_of_nothing_changes_nothing():
    for change in (resample, sinc_resample):
        wave = np.arange(5, dtype=np.float32)
        np.testing.assert_array_equal(change(wave, 8000, 8000), wave)
        assert len(change(wave[:0], 8000, 16000)) == 0
        with pytest.raises(ValueError, match="sample rates must be positive"):
            change(wave, 0, 8000)


def test_a_stretch_of_a_file_is_the_stretch_of_its_samples(tone):
    path, wave = tone
    np.testing.assert_allclose(read_audio(path), wave, atol=PCM16_STEP)
    part = read_audio(path, offset_s=0.25, duration_s=0.5)
    np.testing.assert_array_equal(part, read_audio(path)[4000:12000])
    assert len(read_audio(path, sample_rate_hz=8000)) == 8000
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_audio(file), read_audio(path))


def test_channels_are_averaged_or_one_is_chosen(tmp_path):
    both = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", both, 8000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "stereo.wav"), both.mean(axis=1))
    np.testing.assert_array_equal(read_audio(tmp_path / "stereo.wav", channel=1), both[:, 1])
    with pytest.raises(AudioError) as caught:
        read_audio(tmp_path / "stereo.wav", channel=2)
    assert caught.value.cause == "no_such_channel"


def test_a_duration_rounded_in_the_manifest_is_not_an_error(tone):
    path, wave = tone
    assert len(read_audio(path, duration_s=0.95, is_segment=False)) == 15200
    assert len(read_audio(path, duration_s=1.05, is_segment=False)) == len(wave)


def damaged(kind: str, folder: Path) -> Path:
    path = folder / "bad.wav"
    wave = np.full(16000, 0.1, np.float32)
    if kind == "empty":
        soundfile.write(path, wave[:0], 16000)
    elif kind == "not_finite":
        wave[77] = np.nan
        soundfile.write(path, wave, 16000, subtype="FLOAT")
    elif kind == "unreadable":
        path.write_bytes(b"not audio at all" * 50)
    elif kind in ("truncated", "longer_than_declared"):
        soundfile.write(path, wave, 16000)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:9000])
    return path


OF_STORAGE = {"unreachable", "incomplete", "forbidden", "not_allowed", "timed_out"}
OF_STREAMS = {"no_row", "bad_row", "longer_than_buckets"}
NOT_OF_THE_FILE = {*OF_STORAGE, *OF_STREAMS, "changed", "no_such_channel", "longer_than_model"}


@pytest.mark.parametrize("cause", sorted(set(CAUSES) - NOT_OF_THE_FILE))
def test_a_damaged_file_tells_its_cause(cause, tmp_path):
    declared = 0.5 if cause == "longer_than_declared" else 1.0
    with pytest.raises(AudioError, match="bad.wav") as caught:
        read_audio(damaged(cause, tmp_path), duration_s=declared, is_segment=False)
    assert caught.value.cause == cause


def test_a_flac_file_cut_short_is_refused_without_a_declared_duration(tmp_path):
    path = tmp_path / "cut.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    path.write_bytes(path.read_bytes()[:10000])
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert caught.value.cause in ("truncated", "unreadable")


def test_samples_given_as_an_array_pass_the_same_checks():
    wrong = ([np.inf], [0.0, -np.inf], [np.nan, 0.0], [0.0, 1e11], [-1e11])
    waves = [(np.zeros(0), "empty"), *((np.array(own), "not_finite") for own in wrong)]
    for wave, cause in waves:
        with pytest.raises(AudioError) as caught:
            check_samples(wave)
        assert caught.value.cause == cause
