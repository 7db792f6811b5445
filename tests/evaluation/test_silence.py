"""Long silences are shortened, speech stays."""

import numpy as np

from speechlm2_jax.evaluation.duplex.silence import KEPT_S, without_long_silence

RATE_HZ = 1000


def seconds(*parts):
    """Noise for a positive number of seconds, silence for a negative one."""
    random = np.random.default_rng(0)
    pieces = [random.uniform(-0.5, 0.5, round(abs(s) * RATE_HZ)) * (s > 0) for s in parts]
    return np.concatenate(pieces).astype(np.float32)


def test_long_silences_are_shortened_and_short_ones_stay():
    wave = seconds(-3.0, 1.0, -0.3, 1.0, -4.0, 0.5, -2.0)
    shorter = without_long_silence(wave, RATE_HZ)
    kept_s = 1.0 + 0.3 + 1.0 + 0.5 + 4 * KEPT_S
    assert abs(len(shorter) / RATE_HZ - kept_s) < 0.1
    np.testing.assert_array_equal(shorter[shorter != 0], wave[wave != 0])


def test_what_has_no_long_silence_stays_as_it_is():
    for wave in (seconds(1.0), seconds(-0.2, 1.0), seconds(-2.0), seconds(1.003)):
        np.testing.assert_array_equal(without_long_silence(wave, RATE_HZ), wave)


def test_faint_noise_counts_as_silence():
    wave = seconds(-5.0, 1.0)
    wave += np.random.default_rng(1).uniform(-1e-3, 1e-3, len(wave)).astype(np.float32)
    assert len(without_long_silence(wave, RATE_HZ)) < 1.5 * RATE_HZ
