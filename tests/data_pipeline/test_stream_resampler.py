"""Resampling of a stream: the samples of resampling the whole, whatever the pushes."""

import numpy as np
import pytest

from speechlm2_jax.data.audio import resample
from speechlm2_jax.data.stream_resampler import StreamResampler

NOISE = np.random.default_rng(0).uniform(-1, 1, 12_345).astype(np.float32)


@pytest.mark.parametrize("from_hz", [8000, 16000, 22050, 24000, 48000])
@pytest.mark.parametrize("size", [1, 333, 5000])
def test_any_pushes_are_resampled_bit_for_bit(from_hz, size):
    resampler, wave = StreamResampler(from_hz, 16000), NOISE if size > 1 else NOISE[:1500]
    pieces = [resampler.push(wave[n : n + size]) for n in range(0, len(wave), size)]
    given = sum(map(len, pieces))
    assert len(wave) / from_hz - given / 16000 <= resampler.delay_s + 1 / 16000
    whole = np.concatenate([*pieces, resampler.finish()])
    np.testing.assert_array_equal(whole, resample(wave, from_hz, 16000))


def test_after_the_end_another_stream_begins():
    resampler = StreamResampler(48000, 16000)
    for wave in (NOISE, NOISE[::-1].copy()):
        joined = np.concatenate([resampler.push(wave), resampler.finish()])
        np.testing.assert_array_equal(joined, resample(wave, 48000, 16000))


def test_rates_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="must be positive, got 0 and 16000"):
        StreamResampler(0, 16000)
