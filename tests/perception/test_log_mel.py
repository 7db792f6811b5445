"""Invariants of the mel front end."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig
from speechlm2_jax.settings import SettingsError, build, ignored_report
from tests.perception.small_perception import (
    assert_close,
    assert_finite,
    example_rngs,
    noise,
    padded,
    quick_jit,
)

NEMO_KEYS = {
    "sample_rate": 16000,
    "window_size": 0.02,
    "window_stride": 0.01,
    "n_window_size": None,
    "n_window_stride": None,
    "window": "hann",
    "normalize": "per_feature",
    "n_fft": None,
    "preemph": 0.97,
    "features": 64,
    "lowfreq": 0,
    "highfreq": None,
    "log": True,
    "log_zero_guard_type": "add",
    "log_zero_guard_value": 2**-24,
    "dither": 1e-5,
    "pad_to": 16,
    "frame_splicing": 1,
    "exact_pad": False,
    "pad_value": 0,
    "mag_power": 2.0,
    "rng": None,
    "nb_augmentation_prob": 0.0,
    "nb_max_freq": 4000,
    "mel_norm": "slaney",
    "use_torchaudio": False,
    "stft_exact_pad": False,
    "stft_conv": False,
}
TARGET = "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"


def front_end(config):
    """The compiled module: (audio, lengths, rngs) -> frames."""
    module = LogMel(config)
    return quick_jit(lambda audio, lengths, rngs=None: module(audio, lengths, rngs=rngs))


def test_nemos_own_defaults_are_ours():
    with ignored_report() as report:
        config = build(LogMelConfig, {"_target_": TARGET, **NEMO_KEYS})
    assert config == LogMelConfig()
    assert set(report) == {"use_torchaudio", "stft_exact_pad", "stft_conv", "nb_max_freq"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window", "kaiser"),
        ("normalize", "fixed_mean"),
        ("frame_splicing", 3),
        ("log_zero_guard_type", "max"),
        ("log_zero_guard_value", "small"),
        ("mel_norm", "htk"),
        ("n_window_size", 400),
        ("n_fft", 256),
    ],
)
def test_an_unsupported_value_is_refused_by_name(key, value):
    with pytest.raises(SettingsError, match=key):
        build(LogMelConfig, {**NEMO_KEYS, key: value})


def test_an_odd_hop_with_exact_pad_is_refused():
    with pytest.raises(ValueError, match="exact_pad"):
        LogMelConfig(exact_pad=True, window_stride=None, n_window_stride=161)


def test_padding_changes_no_frame():
    module = front_end(LogMelConfig(pad_to=0))
    clips = [noise(900, seed=1), noise(1600, seed=2)]
    batch = module(*padded(clips, 2400))
    for i, clip in enumerate(clips):
        alone = module(*padded([clip], 1600))
        length = int(alone.lengths[0])
        assert int(batch.lengths[i]) == length
        assert_close(batch.frames[i, :length], alone.frames[0, :length])
        assert not np.any(batch.frames[i, length:])


def test_dither_is_drawn_from_the_key_alone():
    module = front_end(LogMelConfig(pad_to=0, dither=0.1))
    clips = [noise(800, seed=1), noise(800, seed=1)]
    dithered = module(*padded(clips, 800), example_rngs(0, 1)).frames
    swapped = module(*padded(clips, 1600), example_rngs(1, 0)).frames
    assert_close(dithered[0, :5], swapped[1, :5])
    assert_close(dithered[1, :5], swapped[0, :5])
    assert np.abs(dithered[0] - dithered[1]).max() > 0.1
    still = module(*padded(clips, 800)).frames
    assert_close(still[0], still[1], 0.0)


def test_dither_has_the_given_deviation():
    silence, lengths = padded([np.zeros(160_000, np.float32)], 160_000)

    def mean_power(amount, key):
        config = LogMelConfig(dither=amount, preemph=None, pad_to=0, normalize=None, log=False)
        return front_end(config)(silence, lengths, example_rngs(key)).frames.mean()

    assert float(mean_power(0.25, 3) / mean_power(1.0, 4)) == pytest.approx(0.25**2, rel=0.05)


@pytest.mark.parametrize("normalize", ["per_feature", "all_features", "NA"])
def test_empty_and_very_short_clips_are_finite(normalize):
    module = front_end(LogMelConfig(normalize=normalize))
    clips = [noise(n, seed=n) for n in (0, 1, 159, 160, 320)]
    output = module(*padded(clips, 480))
    assert_finite(output.frames)
    assert output.lengths.tolist() == [0, 0, 0, 1, 2]


CONFIGS = (
    LogMelConfig(),
    LogMelConfig(pad_to=0, exact_pad=True),
    LogMelConfig(window_size=0.025, n_fft=1024, window_stride=0.005),
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(CONFIGS), st.lists(st.integers(0, 50_000), min_size=4, max_size=4))
def test_frame_count_is_the_modules_own(config, lengths):
    module = LogMel(config)
    array = jnp.asarray(lengths, jnp.int32)
    assert module.frame_lengths(array).tolist() == [config.frame_count(n) for n in lengths]
    assert module.frame_extents(array).tolist() == [config.frame_extent(n) for n in lengths]
    for n in lengths:
        assert config.frame_extent(n) >= config.frame_count(n)
