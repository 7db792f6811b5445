"""Attention in blocks equals plain attention, and is chosen where it computes less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers import attention, block_attention
from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask, attend
from speechlm2_jax.layers.block_attention import blocks_of, saves

T, LONGEST = 600, 70


def _packed(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segments of at most LONGEST tokens, some keys masked, and padding at the end."""
    draw = np.random.default_rng(seed)
    segments, positions = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row in range(2):
        at, number = 0, 1
        while at + LONGEST < T - 30:
            size = LONGEST if number == 2 else int(draw.integers(1, LONGEST + 1))
            segments[row, at : at + size] = number
            positions[row, at : at + size] = np.arange(size)
            at, number = at + size, number + 1
    real = (segments > 0) & (draw.random(segments.shape) > 0.1)
    return tuple(map(jnp.asarray, (segments, positions, real)))


@pytest.mark.parametrize("window", [None, 20, 400])
def test_blocks_equal_plain_attention_and_so_do_gradients(window, monkeypatch):
    segments, positions, real = _packed(0)
    mask = AttentionMask(
        query_segments=segments,
        key_segments=jnp.where(real, segments, MASKED_KEY),
        window=window,
        longest=LONGEST,
        query_positions=positions,
        key_positions=positions,
    )
    assert mask.reach == min(window or LONGEST, LONGEST) and saves(T, mask.reach)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = zip(keys, (4, 2, 2), strict=True)
    q, k, v = (jax.random.normal(key, (2, T, n, 8), jnp.float32) for key, n in heads)
    weight = jnp.where((segments > 0)[..., None, None], jax.random.normal(keys[0], q.shape), 0)
    has_keys = mask.dense().any(axis=-1)[..., None, None]  # of others the output has no meaning

    def total(mask: AttentionMask, *inputs: jax.Array) -> jax.Array:
        mixed = attend(*inputs, mask=mask, scale=0.3, softcap=2.0)
        return jnp.sum(jnp.where(has_keys, mixed * weight, 0))

    found = jax.value_and_grad(total, argnums=(1, 2, 3))(mask, q, k, v)
    monkeypatch.setattr(attention, "implementation", lambda case: "dense")
    expected = jax.value_and_grad(total, argnums=(1, 2, 3))(mask, q, k, v)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
    )


def test_every_key_within_reach_is_in_the_blocks_of_a_query():
    for reach in range(1, 1200, 7):
        size, before = blocks_of(reach)
        assert before * size >= reach - 1, "the first query of a block looks furthest back"
        assert size % block_attention.SHORTEST_BLOCK == 0


def test_blocks_are_taken_where_they_halve_the_scores():
    assert saves(4096, 600) and saves(256, 64)
    assert not saves(512, 512) and not saves(64, 1) and not saves(4096, None)
