"""Attention around a ring of devices equals attention in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask, attend
from speechlm2_jax.sharding import constrain, make_sharding, use

B, T, N, N_KV, H = 4, 48, 4, 2, 8
SCALE = H**-0.5


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, N_KV, H), (B, T, N_KV, H), (B, T, N, H))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)  # packed sequences
    keys = np.where(rng.random((B, T)) < 0.2, MASKED_KEY, segments)
    keys[:, 0] = MASKED_KEY  # the first query of every sequence attends to nothing
    return arrays, segments, keys.astype(np.int32)


def outcome(arguments, sharding, ring_order):
    (q, k, v, weights), segments, keys = arguments

    def value(q, k, v, weights, segments, keys):
        mask = AttentionMask(query_segments=segments, key_segments=keys, ring_order=ring_order)
        seen = mask.dense().any(axis=2)
        out = attend(q, k, v, mask=mask, scale=SCALE)
        out = jnp.where(seen[..., None, None], out, 0.0)
        return jnp.sum(out * weights), out

    def run(*arrays):
        with use(sharding):
            q, *others = (constrain(x, "batch", "tokens", *(None,) * (x.ndim - 2)) for x in arrays)
            return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(q, *others)

    return jax.jit(run)(q, k, v, weights, segments, keys)


@pytest.mark.parametrize("sizes", [dict(context=8), dict(data=2, tensor=2, context=2)])
def test_ring_equals_plain_attention_and_its_gradients(arguments, sizes):
    sharding = make_sharding(**sizes)
    order = sharding.time_order(T)
    arrays, segments, keys = arguments
    moved = [x[:, order] for x in arrays], segments[:, order], keys[:, order]
    (_, expected), gradients = outcome(arguments, None, None)
    (_, out), ring_gradients = outcome(moved, sharding, order)
    np.testing.assert_allclose(out, expected[:, order], atol=2e-6)
    for own, plain in zip(ring_gradients, gradients, strict=True):
        np.testing.assert_allclose(own, plain[:, order], atol=1e-5)


def test_every_device_has_an_early_and_a_late_part():
    order = make_sharding(data=2, context=4).time_order(16)
    assert order.reshape(4, 2, 2)[:, :, 0].tolist() == [[0, 14], [2, 12], [4, 10], [6, 8]]
    assert sorted(order) == list(range(16))


def test_a_length_that_cannot_be_sharded_evenly_is_refused():
    with pytest.raises(ValueError, match="length 12 must be a multiple of 8"):
        make_sharding(data=2, context=4).time_order(12)
