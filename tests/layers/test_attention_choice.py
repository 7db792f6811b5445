"""The table of attention: what computes which case, and that each entry equals plain attention."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.batches import BatchShape, SalmExample, assemble_salm_batch
from speechlm2_jax.layers import attention
from speechlm2_jax.layers.attention import (
    CACHE,
    MASKED_KEY,
    RING,
    ROWS,
    SEGMENTS,
    SLOTS,
    SPLASH_MIN_TOKENS,
    AttentionMask,
    Case,
    attend,
    implementation,
)
from speechlm2_jax.layers.cudnn_attention import cudnn_attention
from speechlm2_jax.layers.scores import Scores

BF16, FP32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
EVERY_CASE = [
    Case(platform=p, kind=k, tokens=t, head_width=h, dtype=d, is_capped=c, is_chunked=n, divides=v,
         kv_heads=8)
    for p, k, t, h, d, c, n, v in itertools.product(
        ("cpu", "gpu", "tpu"), (ROWS, SEGMENTS, CACHE, RING, SLOTS), (1, 255, 256, 4096),
        (64, 100, 128, 256, 512), (BF16, FP32), (False, True), (False, True), (False, True),
    )
]  # fmt: skip


def test_only_whole_rows_reach_the_kernel_without_segments():
    """cuDNN's attention knows no segments: packed rows, caches and fp32 never take it."""
    taken = [case for case in EVERY_CASE if implementation(case) == "cudnn"]
    assert taken
    for case in taken:
        assert (case.platform, case.kind, case.dtype) == ("gpu", ROWS, BF16)
        assert case.head_width in (64, 128, 256) and case.divides
        assert not case.is_capped and not case.is_chunked


def test_the_table():
    found: dict[str, set] = {}
    for case in EVERY_CASE:
        found.setdefault(implementation(case), set()).add((case.platform, case.kind))
        if case.is_chunked:
            assert implementation(case) == "dense"
        if implementation(case) == "splash":
            assert case.tokens >= SPLASH_MIN_TOKENS and case.divides
        if implementation(case) == "ragged":
            assert case.head_width == 128 and case.divides
            assert implementation(replace(case, kv_heads=3)) == "dense", "not whole tiles"
    assert found["ragged"] == {("tpu", SLOTS)}
    assert found["splash"] == {("tpu", ROWS), ("tpu", SEGMENTS)}
    assert found["ring"] == {(p, RING) for p in ("cpu", "gpu", "tpu")}
    assert {kind for platform, kind in found["dense"] if platform == "cpu"} >= {ROWS, CACHE, SLOTS}
    assert set(found) == {"ring", "splash", "ragged", "cudnn", "dense"}


def test_blocks_are_for_rows_whose_tokens_look_back_a_little():
    near = [replace(case, reach=500) for case in EVERY_CASE]
    taken = [case for case in near if implementation(case) == "blocks"]
    assert {case.kind for case in taken} == {ROWS, SEGMENTS}
    assert {case.tokens for case in taken} == {4096} and not any(c.is_chunked for c in taken)
    assert all(implementation(replace(case, reach=None)) == "dense" for case in taken)
    for case, plain in zip(near, EVERY_CASE, strict=True):
        assert implementation(case) in ("blocks", implementation(plain))


def _inputs(dtype, T=24, N=4, N_kv=2, H=8):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (3, T, heads, H), dtype)
        for key, heads in zip(keys, (N, N_kv, N_kv), strict=True)
    )
    lengths = jnp.asarray([T, 9, 0])
    real = jnp.arange(T)[None] < lengths[:, None]
    return q, k, v, lengths, real


@pytest.mark.parametrize("window", [None, 5])
def test_whole_rows_equal_plain_attention_and_so_do_gradients(window):
    """The same call as on a GPU, computed by XLA."""
    q, k, v, lengths, real = _inputs(FP32)
    mask = AttentionMask(
        query_segments=jnp.zeros(real.shape, jnp.int32),
        key_segments=jnp.where(real, 0, MASKED_KEY),
        window=window,
        query_positions=jnp.broadcast_to(jnp.arange(24), real.shape),
        key_positions=jnp.broadcast_to(jnp.arange(24), real.shape),
        unpacked=True,
    )
    scores = Scores(scale=0.3, window=window)

    def fused(q, k, v):
        return cudnn_attention(q, k, v, lengths=lengths, scores=scores, implementation="xla")

    def plain(q, k, v):
        return attend(q, k, v, mask=mask, scale=0.3)

    weight = jnp.where(real[..., None, None], jax.random.normal(jax.random.key(1), q.shape), 0)
    for of in (fused, plain):
        assert np.isfinite(of(q, k, v)).all()
    found, expected = (
        jax.value_and_grad(lambda *x, of=of: jnp.sum(of(*x) * weight), argnums=(0, 1, 2))(q, k, v)
        for of in (fused, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), found, expected
    )


def test_a_gpu_that_cudnn_refuses_takes_plain_attention(monkeypatch, caplog):
    """On this machine cuDNN is refused too: the line names why, and the result is the plain one."""
    q, k, v, _, real = _inputs(BF16)
    mask = AttentionMask(
        query_segments=jnp.zeros(real.shape, jnp.int32),
        key_segments=jnp.where(real, 0, MASKED_KEY),
        unpacked=True,
    )
    expected = attend(q, k, v, mask=mask, scale=0.3)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    attention._log_once.cache_clear()
    with caplog.at_level("WARNING"):
        found = attend(q, k, v, mask=mask, scale=0.3)
    assert "cuDNN's attention cannot be used" in caplog.text
    np.testing.assert_array_equal(found, expected)


def test_batches_know_whether_their_rows_are_whole():
    def example(name):
        return SalmExample(id=name, tokens=np.arange(5), loss_mask=np.ones(5, bool), audio=())

    def batch(rows):
        return assemble_salm_batch(
            [[example("a"), example("b")]],
            BatchShape(sequences=2, tokens=12, clips=0, samples=0),
            frame_count=lambda n: n,
            placeholder_id=99,
            rows=rows,
        )

    whole = batch(None)
    assert whole.unpacked
    assert not batch([[0, 0]]).unpacked, "packed"
    assert not whole.without_id(3).unpacked, "masked tokens"
    assert whole.map(lambda x: x).unpacked
    assert jax.tree.structure(whole) != jax.tree.structure(batch([[0, 0]])), "another program"
    starts_at_front = (whole.segments > 0) == (
        np.arange(12) < (whole.segments > 0).sum(-1)[..., None]
    )
    assert starts_at_front.all() and (whole.attention_mask == (whole.segments > 0)).all()
