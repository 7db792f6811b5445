"""Invariants of SpecAugment."""

import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.perception.frames import Frames
from speechlm2_jax.perception.spec_augment import SpecAugmentConfig, spec_augment
from speechlm2_jax.settings import SettingsError, build
from tests.perception.small_perception import assert_close, example_rngs, quick_jit

BINS = 16
NEMO_KEYS = {
    "freq_masks": 0,
    "time_masks": 0,
    "freq_width": 10,
    "time_width": 10,
    "rect_masks": 0,
    "rect_time": 5,
    "rect_freq": 20,
    "rng": None,
    "mask_value": 0.0,
    "use_vectorized_spec_augment": True,
    "use_numba_spec_augment": False,
}


def hidden(config, lengths, n_frames, rngs):
    """True where the augmentation put its mask value on frames of ones."""
    frames = jnp.ones((len(lengths), n_frames, BINS))
    features = Frames(frames=frames, lengths=jnp.asarray(lengths, jnp.int32))
    return np.asarray(quick_jit(lambda f, k: spec_augment(f, config, k))(features, rngs)) != 1.0


def runs(line):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line, [0]])))
    return edges[1::2] - edges[::2]


def test_nemos_own_defaults_are_ours_and_hide_nothing():
    config = build(SpecAugmentConfig, NEMO_KEYS)
    assert config == SpecAugmentConfig()
    assert not hidden(config, [20], 20, example_rngs(0)).any()


@pytest.mark.parametrize(
    ("key", "value"), [("rect_masks", 2), ("time_width", 1.5), ("freq_masks", -1), ("time_mask", 1)]
)
def test_settings_that_cannot_be_are_refused_by_name(key, value):
    with pytest.raises(SettingsError, match=key):
        build(SpecAugmentConfig, {**NEMO_KEYS, key: value})


def test_masks_are_drawn_from_key_and_length_alone():
    config = SpecAugmentConfig(freq_masks=2, time_masks=2, freq_width=6, time_width=0.4)
    first = hidden(config, [20, 20], 20, example_rngs(0, 1))
    second = hidden(config, [20, 20], 40, example_rngs(1, 0))[:, :20]
    np.testing.assert_array_equal(first, second[::-1])
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize(("width", "widest"), [(7, 6), (0.25, 9)])
def test_time_masks_hide_whole_frames_of_the_clip_within_their_width(width, widest):
    config = SpecAugmentConfig(time_masks=1, time_width=width)
    masks = hidden(config, [40] * 400, 64, example_rngs(*range(400)))
    assert (masks.all(axis=2) == masks.any(axis=2)).all()
    lines = masks.any(axis=2)
    assert not lines[:, 40:].any()
    sizes = [runs(line) for line in lines]
    assert {len(s) for s in sizes} == {0, 1}
    assert max(s.max(initial=0) for s in sizes) == widest
    # floor(U x width) is uniform on 0 .. width - 1
    assert lines.sum(axis=1).mean() == pytest.approx(widest / 2, rel=0.1)
    assert lines[:, 0].any()
    assert not lines[:, 39].any()  # a mask starts before the last place it fits, as in NeMo


def test_frequency_masks_hide_whole_bins_of_the_clip():
    config = SpecAugmentConfig(freq_masks=1, freq_width=5, mask_value=-2.0)
    masks = hidden(config, [40] * 200, 40, example_rngs(*range(200)))
    assert (masks.all(axis=1) == masks.any(axis=1)).all()
    assert max(runs(line).max(initial=0) for line in masks.any(axis=1)) == 4
    assert masks.any(axis=(0, 1))[: BINS - 1].all()


def test_a_clip_shorter_than_the_mask_and_an_empty_one_are_finite():
    config = SpecAugmentConfig(time_masks=3, time_width=30)
    features = Frames(frames=jnp.ones((3, 4, BINS)), lengths=jnp.asarray([0, 1, 4], jnp.int32))
    output = spec_augment(features, config, example_rngs(0, 1, 2))
    assert np.isfinite(output).all()
    assert_close(jnp.isin(output, jnp.asarray([0.0, 1.0])).all(), True)
