"""The cache holds what was written, where it was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.cache import KVCache, RingCache

L, B, S, K, H = 2, 3, 6, 2, 4


def test_each_layer_reads_what_it_wrote_in_order_of_time() -> None:
    steps = jax.random.normal(jax.random.key(0), (L, 2, B, 5, K, H))
    cache = KVCache.empty((L, B, S, K, H), jnp.float32)
    attention_mask = jnp.asarray(np.random.default_rng(0).random((B, 5)) < 0.5)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        cache = cache.reserve(attention_mask[:, part])
        for layer in range(L):
            cache = cache.write(layer, steps[layer, 0][:, part], steps[layer, 1][:, part])
        cache = cache.advance(part.stop - part.start)
    assert cache.used == 5
    np.testing.assert_array_equal(cache.key_mask, np.pad(attention_mask, ((0, 0), (0, 1))))
    for layer in range(L):
        keys, values = cache.read(layer)
        np.testing.assert_array_equal(keys[:, :5], steps[layer, 0])
        np.testing.assert_array_equal(values[:, :5], steps[layer, 1])
        assert not np.asarray(keys[:, 5:]).any()


def test_more_steps_than_capacity_are_refused() -> None:
    cache = KVCache.empty((L, B, S, K, H), jnp.float32)
    with pytest.raises(ValueError, match="larger capacity"):
        cache.reserve(jnp.ones((B, S + 1), bool))


def test_a_ring_goes_round_after_the_prompts_and_a_new_row_begins_clean() -> None:
    first = 2
    ring = RingCache.around(KVCache.empty((L, B, S, K, H), jnp.float32), first)
    for step in range(S - first + 1):  # once more than it has slots
        ring = ring.reserve(jnp.ones((B, 1), bool))
        ring = ring.write(0, *(jnp.full((B, 1, K, H), step + 1.0),) * 2).advance(1)
    assert ring.read(0)[0][0, :, 0, 0].tolist() == [0, 0, 5, 2, 3, 4]
    assert np.asarray(ring.key_mask)[:, first:].all() and ring.used == S
    prompts = KVCache.empty((L, 2, 3, K, H), jnp.float32)
    prompts = prompts.reserve(jnp.ones((2, 3), bool)).write(0, *(jnp.full((2, 3, K, H), 9.0),) * 2)
    ring = ring.admit(jnp.asarray([[1, B]]), prompts)
    assert ring.read(0)[0][1, :, 0, 0].tolist() == [9, 9, 5, 2, 3, 4]
    assert ring.key_mask.tolist() == [
        [False, False, True, True, True, True],
        [True, True, False, False, False, False],
        [False, False, True, True, True, True],
    ]
