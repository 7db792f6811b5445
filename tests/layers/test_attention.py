"""Attention against its definition, and where nothing is visible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask, attend

ATOL = 1e-5  # one layer in fp32
B, T, S, N, K, H = 2, 5, 7, 4, 2, 6
SCALE = H**-0.5


def inputs(dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def some_visible() -> AttentionMask:
    """Queries take slots 2..6; row 1 hides two keys and puts its queries in another segment."""
    return AttentionMask(
        query_segments=jnp.asarray([[1] * 5, [2] * 5]),
        key_segments=jnp.asarray([[1] * 7, [1, 1, 2, MASKED_KEY, 2, MASKED_KEY, 2]]),
        offset=2,
    )


def test_visible_means_same_segment_no_later_slot_and_a_key() -> None:
    expected = [
        [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0],
         [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
        [[0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0],
         [0, 0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0, 1]],
    ]  # fmt: skip
    np.testing.assert_array_equal(some_visible().dense(), np.asarray(expected, bool))


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(mask[b, t])
        head = n // (N // K)
        weights = np.exp(k[b, keys, head].astype(np.float64) @ q[b, t, n] * SCALE)
        out[b, t, n] = weights / weights.sum() @ v[b, keys, head]
    return out


def test_attention_is_a_softmax_over_visible_keys_of_the_group() -> None:
    q, k, v = inputs()
    mask = some_visible()
    expected = by_hand(*map(np.asarray, (q, k, v, mask.dense())))
    out = attend(q, k, v, mask=mask, scale=SCALE)
    np.testing.assert_allclose(out, expected, atol=ATOL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_without_keys_are_finite_with_finite_gradients(dtype: str) -> None:
    nothing = AttentionMask(
        query_segments=jnp.ones((B, T), jnp.int32),
        key_segments=jnp.full((B, S), MASKED_KEY),
    )

    def total(*qkv: jax.Array) -> jax.Array:
        out = attend(*qkv, mask=nothing, scale=SCALE)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs(dtype))
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


def test_hidden_keys_have_no_influence_and_no_gradient() -> None:
    q, k, v = inputs()

    def total(k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, mask=some_visible(), scale=SCALE) ** 2)

    hidden = (1, np.asarray([0, 1, 3, 5]))
    moved = (x.at[hidden].add(100.0) for x in (k, v))
    np.testing.assert_array_equal(total(*moved), total(k, v))
    for gradient in jax.grad(total, argnums=(0, 1))(k, v):
        assert not np.asarray(gradient)[hidden].any()
        assert np.asarray(gradient)[0].any()
