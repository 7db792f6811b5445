"""The TPU's kernel, interpreted, equals attention written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers import attention
from speechlm2_jax.layers.attention import MASKED_KEY, AttentionMask, attend
from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.layers.splash_attention import splash_attention
from speechlm2_jax.sharding import make_sharding, use

B, T, N, K = 4, 320, 4, 2  # steps that do not fill the kernel's blocks


def rows(width: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, width), (B, T, K, width), (B, T, K, width), (B, T, N, width))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)  # packed rows
    keys = np.where(rng.random((B, T)) < 0.2, MASKED_KEY, segments)
    keys[:, 0] = MASKED_KEY  # the first query of every row sees nothing
    return arrays, segments, keys.astype(np.int32)


def outcome(how, arrays, segments, keys):
    def value(q, k, v, weights):
        segment_ids = jnp.asarray(segments), jnp.asarray(keys)
        out = how(q, k, v, *segment_ids)
        mask = AttentionMask(query_segments=segment_ids[0], key_segments=segment_ids[1])
        seen = mask.dense().any(axis=2)
        out = jnp.where(seen[..., None, None], out, 0.0)
        return jnp.sum(out * weights), out

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays)


def written_out(q, k, v, segments, keys):
    mask = AttentionMask(query_segments=segments, key_segments=keys)
    return attend(q, k, v, mask=mask, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize(
    ("width", "sizes"), [(64, None), (128, None), (128, dict(data=2, fsdp=2, tensor=2))]
)
def test_the_kernel_equals_plain_attention_and_its_gradients(width, sizes):
    def kernel(q, k, v, segments, keys):
        with use(make_sharding(**sizes) if sizes else None):
            return splash_attention(
                *(q, k, v),
                query_segments=segments,
                key_segments=keys,
                scores=Scores(scale=width**-0.5),
                interpret=True,
            )

    (_, expected), gradients = outcome(written_out, *rows(width))
    (_, out), own = outcome(kernel, *rows(width))
    np.testing.assert_allclose(out, expected, atol=5e-6)
    for mine, plain in zip(own, gradients, strict=True):
        np.testing.assert_allclose(mine, plain, atol=3e-5)


@pytest.mark.parametrize(
    ("platform", "length", "offset", "is_kernel"),
    [
        ("tpu", T, None, True),
        ("tpu", 64, None, False),
        ("tpu", T, 0, False),
        ("cpu", T, None, False),
    ],
)
def test_it_is_chosen_for_whole_sequences_on_a_tpu(
    monkeypatch, platform, length, offset, is_kernel
):
    used = []
    monkeypatch.setattr(attention, "platform", lambda: platform)
    monkeypatch.setattr(attention, "splash_attention", lambda q, *_, **__: used.append(1) or q)
    arrays, segments, keys = rows(8)
    mask = AttentionMask(
        query_segments=jnp.asarray(segments[:, :length]),
        key_segments=jnp.asarray(keys[:, :length]),
        offset=offset,
    )
    q, k, v = (jnp.asarray(x[:, :length]) for x in arrays[:3])
    attend(q, k, v, mask=mask, scale=1.0)
    assert bool(used) == is_kernel
