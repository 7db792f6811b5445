"""Attention over pages equals plain attention over each sequence's own tokens."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ref_ragged_paged_attention

from speechlm2_jax.layers import ragged_attention
from speechlm2_jax.layers.attention import AttentionMask, attend
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.paged_cache import PagedCache
from speechlm2_jax.layers.ragged_attention import PAGE_TOKENS, tiles_heads
from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.sharding import make_sharding, use
from tests.layers.ragged_kernel import written_out

L, B, T, N, K, H = 2, 4, 150, 4, 2, 8
STEPS = 3
LENGTHS = np.array([127, 150, 1, 40])  # the first fills its page with its first new token
SOFTCAPS = {0: None, 1: 5.0}


def tokens(seed: int, length: int) -> np.ndarray:
    """Queries' source, keys and values of `length` tokens: [L, 2, B, length, K, H]."""
    return np.random.default_rng(seed).standard_normal((L, 2, B, length, K, H), np.float32)


def admitted(mask: np.ndarray, prompt: np.ndarray) -> PagedCache:
    """Slots of which three hold another prompt before each gets its own."""
    cache = PagedCache.empty((L, B, T + STEPS, K, H), jnp.float32, T)
    assert cache.pages.shape[2] == 2 * PAGE_TOKENS
    for number, kept in enumerate((np.roll(mask, 1, axis=0), mask)):
        prompts = KVCache.empty((L, B, T + 7, K, H), jnp.float32).reserve(jnp.asarray(kept))
        for layer in range(L):
            prompts = prompts.write(layer, *jnp.asarray(prompt[layer] + 1 - number))
        cache = cache.admit(jnp.arange(B)[None], prompts.advance(T))
    return cache


def steps(cache: PagedCache, new: np.ndarray, queries: np.ndarray, is_open: jax.Array):
    """Decodes; returns [STEPS, L, B, N, H] and the cache."""
    outputs = []
    for step in range(STEPS):
        cache = cache.reserve(is_open[step][:, None])
        for layer in range(L):
            cache = cache.write(layer, *new[layer, :, :, step : step + 1])
            mask = AttentionMask(
                query_segments=jnp.zeros((B, 1), jnp.int32), key_segments=cache.key_mask - 1
            )
            out = attend(
                queries[step, layer][:, None],
                *cache.read(layer),
                mask=mask,
                scale=0.3,
                softcap=SOFTCAPS[layer],
            )
            outputs.append(out[:, 0])
        cache = cache.advance(1)
    return jnp.stack(outputs).reshape(STEPS, L, B, N, H), cache


def expected(mask, prompt, new, queries, is_open):
    """Each sequence by itself: its keys and values in a row, scores and weights written out."""
    out = np.zeros((STEPS, L, B, N, H), np.float32)
    for step, layer, b in np.ndindex(STEPS, L, B):
        if not is_open[step, b]:
            continue
        fed = np.flatnonzero(is_open[: step + 1, b])
        k, v = (
            np.concatenate([prompt[layer, i, b][mask[b]], new[layer, i, b][fed]]) for i in (0, 1)
        )
        for head in range(N):
            own = head * K // N
            scores = 0.3 * k[:, own] @ queries[step, layer, b, head]
            if SOFTCAPS[layer] is not None:
                scores = SOFTCAPS[layer] * np.tanh(scores / SOFTCAPS[layer])
            weights = np.exp(scores - scores.max())
            out[step, layer, b, head] = weights @ v[:, own] / weights.sum()
    return out


@pytest.mark.parametrize("sizes", [None, dict(data=2, tensor=2, devices=jax.devices()[:4])])
@pytest.mark.parametrize("has_gaps", [False, True])
def test_pages_equal_plain_attention(monkeypatch, sizes, has_gaps):
    """Prompts of other lengths were there before; two sequences end. On a mesh, sharded."""
    monkeypatch.setattr(ragged_attention, "kernel", written_out)
    mask = np.arange(T)[None] < LENGTHS[:, None]
    if has_gaps:
        mask[:, 5:9] &= np.array([True, False, True, False])
    is_open = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1]], bool)
    prompt, new = tokens(0, T), tokens(1, STEPS)
    queries = np.random.default_rng(2).standard_normal((STEPS, L, B, N, H), np.float32)

    def run(prompt, new, queries):
        with use(make_sharding(**sizes)) if sizes else nullcontext():
            return steps(admitted(mask, prompt), new, queries, jnp.asarray(is_open))

    arrays = [jnp.asarray(x) for x in (prompt, new, queries)]
    out, cache = jax.jit(run)(*arrays)
    assert cache.used.tolist() == (mask.sum(1) + is_open.sum(0)).tolist()
    found = np.where(is_open[:, None, :, None, None], out, 0)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(found, expected(mask, prompt, new, queries, is_open), atol=2e-6)


def test_the_kernel_gets_what_its_reference_reads(monkeypatch):
    """The arguments fit JAX's own reference of the kernel, which computes the same."""
    calls = []

    def both(*arrays, num_kv_pages_per_block, num_queries_per_block, **options):
        assert num_kv_pages_per_block == 2 and num_queries_per_block == 2
        calls.append(ref_ragged_paged_attention(*arrays, **options))
        return written_out(*arrays, **options)

    monkeypatch.setattr(ragged_attention, "kernel", both)
    kept = np.random.default_rng(3).standard_normal((L, 2, 3 * PAGE_TOKENS, 2 * K, H), np.float32)
    q = jnp.asarray(np.random.default_rng(4).standard_normal((2, 1, N, H), np.float32))
    pages = ragged_attention.Pages(jnp.asarray(kept), 1, jnp.asarray([1, 300]))
    out = ragged_attention.ragged_attention(q, pages, Scores(scale=0.3, softcap=5.0))
    np.testing.assert_allclose(out[:, 0], calls[0], atol=2e-6)


def test_a_full_sequence_writes_nowhere():
    cache = PagedCache.empty((1, 2, PAGE_TOKENS, 1, H), jnp.float32, 4)
    cache = replace(cache, used=jnp.full(2, PAGE_TOKENS - 1), is_open=jnp.ones(2, bool)).advance(1)
    ones = jnp.ones((2, 1, 1, H))
    assert cache.used.tolist() == [PAGE_TOKENS] * 2
    np.testing.assert_array_equal(cache.write(0, ones, ones).pages, cache.pages)


def test_the_kernels_tiles():
    """On one device the keys and values of a position fill whole rows of tiles."""
    for dtype in ("bfloat16", "float32"):
        found = {n for n in range(1, 25) if tiles_heads(n, jnp.dtype(dtype))}
        assert {1, 2, 4, 8, 16, 24} <= found and not {3, 5, 6, 7, 9} & found
