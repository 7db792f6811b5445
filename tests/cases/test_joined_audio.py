"""Recordings that were joined into one file, at rates whose frames end anywhere."""

import io

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.audio import AudioError, audio_length, read_audio


def noise(seconds, rate_hz, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz))


def flac(wave, rate_hz):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate_hz, format="FLAC")
    return buffer.getvalue()


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("seconds", [(1.0, 1.0), (0.3, 1.7, 0.05)])
def test_joined_flacs_have_all_samples_of_each(tmp_path, rate_hz, seconds):
    waves = [noise(s, rate_hz, n) for n, s in enumerate(seconds)]
    path = tmp_path / "a.flac"
    path.write_bytes(b"".join(flac(wave, rate_hz) for wave in waves))
    whole = np.concatenate([read_audio(io.BytesIO(flac(wave, rate_hz))) for wave in waves])
    assert audio_length(path) == (len(whole), rate_hz)
    np.testing.assert_array_equal(read_audio(path), whole)
    np.testing.assert_array_equal(read_audio(io.BytesIO(path.read_bytes())), whole)
    begin, count = (int(s * rate_hz + 0.5) for s in (0.25, 1.3))
    part = read_audio(path, offset_s=0.25, duration_s=1.3)
    np.testing.assert_array_equal(part, whole[begin : begin + count])


@pytest.mark.parametrize(("kind", "rate_hz"), [("VORBIS", 16000), ("OPUS", 8000), ("OPUS", 48000)])
def test_joined_oggs_have_all_samples_of_each(tmp_path, kind, rate_hz):
    each = []
    for seed, seconds in enumerate((0.2, 1.0)):
        buffer = io.BytesIO()
        wave = noise(seconds, rate_hz, seed)
        soundfile.write(buffer, wave, rate_hz, format="OGG", subtype=kind)
        each.append(buffer.getvalue())
    for order in (each, [each[1], each[1]]):
        path = tmp_path / "a.ogg"
        path.write_bytes(b"".join(order))
        whole = np.concatenate([read_audio(io.BytesIO(data)) for data in order])
        assert audio_length(path) == (len(whole), rate_hz)
        np.testing.assert_array_equal(read_audio(path), whole)


def test_a_joined_flac_that_was_cut_off_is_an_error(tmp_path):
    path = tmp_path / "a.flac"
    data = flac(noise(1.0, 16000), 16000)
    path.write_bytes(data + data[: len(data) // 2])
    with pytest.raises(AudioError) as caught:
        read_audio(path, duration_s=2.0, is_segment=False)
    assert caught.value.cause in ("truncated", "unreadable")


def test_joined_flacs_of_several_rates_are_refused(tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(flac(noise(1.0, 16000), 16000) + flac(noise(1.0, 8000), 8000))
    with pytest.raises(AudioError, match="sample rate changes from 16000 to 8000 Hz") as caught:
        read_audio(path)
    assert caught.value.cause == "unreadable"


def test_the_mark_of_a_flac_among_its_samples_joins_nothing(tmp_path):
    path = tmp_path / "a.flac"
    mark = np.frombuffer(b"fLaC\x01\x00\x00\x22" * 300, "<i2")
    data = np.stack([mark, np.random.default_rng(0).integers(-(2**15), 2**15, len(mark))], axis=1)
    soundfile.write(path, data.astype(np.int16), 16000, subtype="PCM_16")
    path.write_bytes(path.read_bytes() + b"fLaC at the end")
    assert audio_length(path).samples == len(mark)
