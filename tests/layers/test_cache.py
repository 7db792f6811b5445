"""The cache holds what was written, where it was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.cache import KVCache

L, B, S, K, H = 2, 3, 6, 2, 4


def test_each_layer_reads_what_it_wrote_in_order_of_time() -> None:
    steps = jax.random.normal(jax.random.key(0), (L, 2, B, 5, K, H))
    cache = KVCache.empty((L, B, S, K, H), jnp.float32)
    is_key = jnp.asarray(np.random.default_rng(0).random((B, 5)) < 0.5)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        cache = cache.announce(is_key[:, part])
        for layer in range(L):
            cache = cache.write(layer, steps[layer, 0][:, part], steps[layer, 1][:, part])
        cache = cache.advance(part.stop - part.start)
    assert cache.used == 5
    np.testing.assert_array_equal(cache.is_key, np.pad(is_key, ((0, 0), (0, 1))))
    for layer in range(L):
        keys, values = cache.read(layer)
        np.testing.assert_array_equal(keys[:, :5], steps[layer, 0])
        np.testing.assert_array_equal(values[:, :5], steps[layer, 1])
        assert not np.asarray(keys[:, 5:]).any()


def test_more_steps_than_capacity_are_refused() -> None:
    cache = KVCache.empty((L, B, S, K, H), jnp.float32)
    with pytest.raises(ValueError, match="larger capacity"):
        cache.announce(jnp.ones((B, S + 1), bool))
