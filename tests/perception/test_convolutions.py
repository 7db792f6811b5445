"""The convolutions, written as sums over taps, and batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.perception.batch_norm import EPS, MOMENTUM, BatchNorm
from speechlm2_jax.perception.conformer_layer import DepthwiseConv
from speechlm2_jax.perception.subsampling import HalvingConv
from tests.perception.small_perception import assert_close, encoder_config, noise, quick_jit


@pytest.mark.parametrize("padding", [(1, 1), (2, 1)])
@pytest.mark.parametrize("channels", [(1, 4), (3, 5), (4, 4)])
@pytest.mark.parametrize("size", [(7, 10), (8, 1)])
def test_a_halving_convolution_is_xlas_strided_one(padding, channels, size):
    depthwise = channels[0] == channels[1]
    conv = HalvingConv(*channels, padding=padding, depthwise=depthwise, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.asarray(noise(channels[1]))
    x = jnp.asarray(noise(2, *size, channels[0]))

    @quick_jit
    def both(x):
        expected = jax.lax.conv_general_dilated(
            x,
            conv.weight[...],
            (2, 2),
            (padding, padding),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            feature_group_count=channels[0] if depthwise else 1,
        )
        return conv(x), expected + conv.bias[...][None, None, None]

    assert_close(*both(x))


@pytest.mark.parametrize("context", [None, "causal", (1, 3), "regular"])
def test_a_depthwise_convolution_is_xlas_grouped_one(context):
    config = encoder_config(conv_context_size=context)
    conv = DepthwiseConv(config, rngs=nnx.Rngs(0))
    x = jnp.asarray(noise(2, 6, config.d_model))
    expected = jax.lax.conv_general_dilated(
        x,
        conv.weight[...][:, None],
        (1,),
        (config.conv_context,),
        dimension_numbers=("NHC", "OIH", "NHC"),
        feature_group_count=config.d_model,
    )
    assert_close(conv(x), expected)
    assert config.conv_context == {"causal": (4, 0), (1, 3): (1, 3)}.get(context, (2, 2))


def test_batch_norm_measures_the_counted_frames_only():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    x = noise(2, 4, 3)
    counted = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    y, statistics = norm(jnp.asarray(x), jnp.asarray(counted))
    frames = x[counted]
    assert_close(y, (x - frames.mean(0)) / np.sqrt(frames.var(0) + EPS))
    assert_close(statistics["running_mean"], MOMENTUM * frames.mean(0))
    unbiased = frames.var(0, ddof=1)
    assert_close(statistics["running_var"], 1.0 + MOMENTUM * (unbiased - 1.0))
    assert int(statistics["batches_tracked"]) == 1


def test_batch_norm_keeps_its_statistics_when_nothing_is_counted():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    y, statistics = norm(jnp.asarray(noise(1, 2, 3)), jnp.zeros((1, 2), bool))
    assert np.isfinite(y).all()
    assert_close(statistics["running_mean"], np.zeros(3), 0.0)
    assert_close(statistics["running_var"], np.ones(3), 0.0)
    assert int(statistics["batches_tracked"]) == 0


def test_batch_norm_in_evaluation_uses_and_keeps_the_running_statistics():
    norm = BatchNorm(2, rngs=nnx.Rngs(0))
    norm.running_mean[...] = jnp.asarray([1.0, -1.0])
    norm.running_var[...] = jnp.asarray([4.0, 0.25])
    x = noise(1, 3, 2)
    y, statistics = norm(jnp.asarray(x))
    assert_close(y, (x - [1.0, -1.0]) / np.sqrt(np.array([4.0, 0.25]) + EPS))
    assert statistics == {}
