"""Convolutions of few channels, computed in blocks of positions, equal the plain sum."""

import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.codec import convolutions
from speechlm2_jax.codec.boundary import PaddedSequence


def summed(x, kernel, dilation):
    """[B, T, C], [P, C, D] -> [B, T - (P - 1) dilation, D] in float64."""
    length = x.shape[1] - (len(kernel) - 1) * dilation
    taps = [x[:, p * dilation : p * dilation + length] @ tap for p, tap in enumerate(kernel)]
    return sum(taps)


@pytest.mark.parametrize("channels", [(1, 1), (2, 2), (4, 3), (1, 24), (27, 1)])
@pytest.mark.parametrize("taps, dilation", [(2, 1), (3, 1), (7, 3), (11, 5)])
@pytest.mark.parametrize("given", ["written", "before", "both"])
def test_blocks_of_positions_give_the_same_sum(channels, taps, dilation, given):
    assert convolutions._block_size(*channels) > 1
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 61, channels[0])), random.normal(size=(taps, *channels))
    reach = (taps - 1) * dilation
    half = reach // 2 // dilation * dilation
    zeros = {"written": (0, 0), "before": (reach, 0), "both": (half, reach - half)}[given]
    whole = np.pad(x, ((0, 0), zeros, (0, 0)))
    result = convolutions._convolve(
        PaddedSequence(jnp.asarray(x, jnp.float32), zeros),
        jnp.asarray(kernel, jnp.float32),
        dilation,
    )
    np.testing.assert_allclose(result, summed(whole, kernel, dilation), atol=1e-4)


def test_a_rate_change_may_pad_by_one_position_on_each_side():
    random = np.random.default_rng(1)
    x, kernel = random.normal(size=(2, 16, 2)), random.normal(size=(2, 2, 6))
    assert convolutions._block_size(2, 6) > 1
    result = convolutions._convolve(
        PaddedSequence(jnp.asarray(x, jnp.float32), (1, 1)), jnp.asarray(kernel, jnp.float32)
    )
    assert result.shape == (2, 17, 6)
    whole = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    np.testing.assert_allclose(result, summed(whole, kernel, 1), atol=1e-4)


def test_many_channels_are_not_convolved_in_blocks():
    assert convolutions._block_size(16, 16) == convolutions._block_size(864, 432) == 1
