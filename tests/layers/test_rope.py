"""Rotary positions: definition, relativity, and the scalings that checkpoints use."""

import jax.numpy as jnp
import numpy as np

from speechlm2_jax.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    rotate,
    rotation,
)

ATOL = 1e-5  # one layer in fp32
H = 8


def turned(x: np.ndarray, positions: list[int], config: RopeConfig) -> np.ndarray:
    by = rotation(config, jnp.asarray([positions]), H)
    return np.asarray(rotate(jnp.asarray(x, jnp.float32), by))


def test_a_pair_turns_as_a_complex_number() -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 2, H))
    positions = [0, 5, 300]
    angles = np.outer(positions, 10000.0 ** -(np.arange(H // 2) * 2 / H))[None, :, None, :]
    complex_x = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angles)
    expected = np.concatenate([complex_x.real, complex_x.imag], axis=-1)
    np.testing.assert_allclose(turned(x, positions, RopeConfig()), expected, atol=1e-4)


def test_products_depend_on_the_difference_of_positions_only() -> None:
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 1, H))
    products = [
        np.sum(turned(q, [a], RopeConfig()) * turned(k, [b], RopeConfig()))
        for a, b in ((7, 3), (107, 103), (4, 0))
    ]
    np.testing.assert_allclose(products, products[0], atol=ATOL)


def test_angles_are_fp32_for_bf16_activations() -> None:
    x = jnp.ones((1, 1, 1, H), jnp.bfloat16)
    by = rotation(RopeConfig(), jnp.asarray([[4097]]), H)
    assert by.cos.dtype == jnp.float32
    assert rotate(x, by).dtype == jnp.bfloat16
    np.testing.assert_allclose(by.cos[0, 0, 0], np.cos(4097.0), atol=ATOL)


def test_linear_scaling_divides_positions() -> None:
    x = np.random.default_rng(2).standard_normal((1, 2, 1, H))
    scaled = RopeConfig(scaling=LinearScaling(factor=4.0))
    np.testing.assert_allclose(
        turned(x, [8, 40], scaled), turned(x, [2, 10], RopeConfig()), atol=ATOL
    )


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192
    )
    frequencies = RopeConfig(theta=500000.0).frequencies(128)
    scaled = RopeConfig(theta=500000.0, scaling=scaling).frequencies(128)
    wavelengths = 2 * np.pi / frequencies
    short, long = wavelengths < 8192 / 4.0, wavelengths > 8192 / 1.0
    np.testing.assert_array_equal(scaled[short], frequencies[short])
    np.testing.assert_allclose(scaled[long], frequencies[long] / 8.0, rtol=1e-6)
    share = (8192 / wavelengths - 1.0) / 3.0
    between = (1 - share) * frequencies / 8.0 + share * frequencies
    middle = ~short & ~long
    assert middle.any()
    np.testing.assert_allclose(scaled[middle], between[middle], rtol=1e-5)
