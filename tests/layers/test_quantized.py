"""Arrays in 8 bits: what rounding costs, and that layers and caches compute with what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers.attention import AttentionMask, attend
from speechlm2_jax.layers.cache import DraftCache, KVCache, RingCache
from speechlm2_jax.layers.linear import Embedding, Linear
from speechlm2_jax.layers.module import describe, merge, split
from speechlm2_jax.layers.quantized import (
    DTYPES,
    LARGEST,
    QuantizedArray,
    dequantize,
    fp8_problem,
    is_quantized,
    quantize,
)
from speechlm2_jax.layers.quantized_layers import quantize_module, quantized_paths, unquantized
from speechlm2_jax.layers.stack import scan_layers, stack
from speechlm2_jax.layers.window_cache import NewTokens, WindowCache
from speechlm2_jax.sharding import make_sharding, use

KINDS = ["int8", pytest.param("fp8", marks=pytest.mark.slow)]
"""fp8 is the same code with another dtype: its rounding is a quick test, the rest is slow."""
STEP = {"int8": 0.5 / 127, "fp8": 1 / 16}
"""Largest rounding error, of a row's largest magnitude (int8) or of the value itself (fp8: 3 bits
of mantissa)."""
SCALE_ERROR = 2**-8
"""A scale in bf16 may be so much too small, and cut off the largest value, or too large."""


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def floats(layer: Linear | Embedding) -> np.ndarray:
    """The weight that a quantized layer stands for."""
    scale = np.asarray(layer.weight_scale[...], np.float32)[..., None]
    return np.asarray(layer.weight[...]).astype(np.float32) * scale


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_rounding_is_within_half_a_step(kind, scale_dtype):
    x = drawn(40, 64) * jnp.geomspace(1e-6, 1e6, 40)[:, None]
    made = quantize(x, DTYPES[kind], scale_dtype)
    assert made.values.dtype == DTYPES[kind] and made.scales.shape == (40, 1)
    error = np.abs(dequantize(made, jnp.float32) - x)
    largest = np.abs(x).max(axis=1, keepdims=True)
    smallest = np.abs(x) if kind == "fp8" else largest
    inexact = SCALE_ERROR if scale_dtype == "bfloat16" else 1e-6
    tiny = largest / LARGEST[DTYPES[kind]] * 2**-9 if kind == "fp8" else 0  # below fp8's normals
    bound = np.maximum((STEP[kind] * smallest + tiny) * (1 + inexact), inexact * largest)
    assert (error <= bound).all()
    assert np.abs(np.asarray(made.values).astype(np.float32)).max() == LARGEST[DTYPES[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_what_is_representable_is_exact(kind):
    largest = LARGEST[DTYPES[kind]]
    exact = jnp.asarray([[0.0, 0.0], [-largest, 64.0]])
    made = quantize(exact, DTYPES[kind], jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(made, jnp.float32), exact)
    again = quantize(dequantize(made, jnp.float32), DTYPES[kind], jnp.bfloat16)
    np.testing.assert_array_equal(again.values, made.values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [None, pytest.param({"tensor": 8}, marks=pytest.mark.slow)])
def test_a_linear_layer_computes_with_its_rounded_weight(kind, rows, mesh):
    layer = Linear(64, 48, axes=("mlp", "embed"), rngs=nnx.Rngs(0))
    quantize_module(layer, kind)
    x, expected = drawn(rows, 64), floats(layer)
    graphdef, variables = split(layer)

    def run(variables, x):
        with use(None if mesh is None else make_sharding(**mesh)):
            return merge(graphdef, variables)(x)

    y, vjp = jax.vjp(lambda x: jax.jit(run)(variables, x), x)
    by_hand = np.asarray(x) @ expected.T + np.asarray(layer.bias[...])
    np.testing.assert_allclose(y, by_hand, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(jnp.ones_like(y))[0][0], expected.sum(0), rtol=1e-4, atol=1e-5)


class Tower(nnx.Module):
    """A table and a stack of layers."""

    def __init__(self, rngs: nnx.Rngs):
        def make(layer_rngs: nnx.Rngs) -> Linear:
            return Linear(64, 64, axes=("mlp", "embed"), rngs=layer_rngs)

        self.table = Embedding(5, 64, rngs=rngs)
        self.layers = stack(make, 3, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.table(ids)
        return scan_layers(self.layers, lambda layer, x, _: (jnp.tanh(layer(x)), None), x)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_a_quarter_of_the_bytes_and_no_float_copy_of_them_is_made(kind):
    plain, tower = Tower(nnx.Rngs(0)), quantize_module(Tower(nnx.Rngs(0)), kind)
    infos = describe(tower)
    assert quantized_paths(infos) == ["layers.weight", "table.weight"]
    assert unquantized(infos) == describe(plain)
    assert infos["layers.weight_scale"].axes == ("layers", "mlp")
    assert all(infos[p].computed_in(jnp.float32) == DTYPES[kind] for p in quantized_paths(infos))
    graphdef, variables = split(tower)
    held = sum(x.nbytes for x in variables.values())
    whole = sum(x.nbytes for x in split(plain)[1].values())
    assert held < 0.3 * whole
    ids = jnp.asarray([3, 1])

    def looped(variables, ids):
        tower = merge(graphdef, variables)
        x = tower.table(ids)
        return jax.lax.fori_loop(0, 4, lambda _, y: y + tower(ids), x)

    program = jax.jit(looped).lower(variables, ids).compile()
    if kind == "int8":  # XLA on a CPU converts fp8 before the loop; there it is for accuracy alone
        floating = 4 * variables["layers.weight"].size
        assert program.memory_analysis().temp_size_in_bytes < floating / 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_gives_its_rounded_rows(kind):
    table = quantize_module(Embedding(7, 16, rngs=nnx.Rngs(0)), kind)
    ids = jnp.asarray([[3, 0], [6, 6]])
    np.testing.assert_array_equal(table(ids), floats(table)[np.asarray(ids)])


L, B, S, N, H = 2, 3, 6, 2, 4


def floating(x: QuantizedArray) -> np.ndarray:
    return np.asarray(dequantize(x, jnp.float32))


def rounded(x: jax.Array, kind: str) -> np.ndarray:
    return np.asarray(dequantize(quantize(x, DTYPES[kind], x.dtype), x.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_back_what_was_written_rounded_once(kind):
    tokens = drawn(2, B, 5, N, H)
    cache = KVCache.empty((L, B, S, N, H), jnp.float32, kind=kind)
    assert cache.dtype == jnp.float32 and is_quantized(cache.keys.values)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        cache = cache.reserve(jnp.ones((B, part.stop - part.start), bool))
        cache = cache.write(1, tokens[0][:, part], tokens[1][:, part])
        cache = cache.advance(part.stop - part.start)
    for read, given in zip(map(floating, cache.read(1)), tokens, strict=True):
        np.testing.assert_array_equal(read[:, :5], rounded(given, kind))
        assert not read[:, 5:].any()
    wide = cache.repeated(2, S + 1).reordered(jnp.asarray([[1, 1]] * B), since=4)
    again = floating(wide.read(1)[0])[1::2, :S]
    np.testing.assert_array_equal(again, floating(cache.read(1)[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_drafts_keep_the_rounded_values(kind):
    given = drawn(2, 2, 2, N, H)
    prompts = KVCache.empty((L, 2, 2, N, H), jnp.float32, kind=kind)
    prompts = prompts.reserve(jnp.ones((2, 2), bool)).write(0, *given)
    ring = RingCache.around(KVCache.empty((L, B, S, N, H), jnp.float32, kind=kind), 2)
    ring = ring.admit(jnp.asarray([[2, B]]), prompts)
    np.testing.assert_array_equal(floating(ring.read(0)[1])[2, :2], rounded(given[1], kind)[0])
    longer = prompts.advance(2).repeated(1, S)
    drafts = DraftCache.after_prompts(longer, 2, jnp.asarray([2, 2]), 2)
    drafts = drafts.keep(jnp.asarray([2, 3]), jnp.asarray([2, 3])).write(0, *given)
    keys = floating(drafts.read(0)[0])
    for row, start in enumerate((2, 3)):
        np.testing.assert_array_equal(keys[row, start : start + 2], rounded(given[0], kind)[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_attends_to_the_same_values_token_by_token_and_at_once(kind):
    tokens = drawn(2, 1, 5, N, H)
    positions, is_real = jnp.arange(5)[None], jnp.ones((1, 5), bool)
    at_once = WindowCache.empty((L, 1, S, N, H), 8, jnp.float32, kind)
    one_by_one = at_once
    at_once, keys, _ = at_once.update(0, *tokens, NewTokens(positions, is_real))
    for t in range(5):
        new = NewTokens(positions[:, t : t + 1], is_real[:, t : t + 1])
        given = (x[:, t : t + 1] for x in tokens)
        one_by_one, seen, _ = one_by_one.update(0, *given, new)
        one_by_one = one_by_one.advance(new)
    np.testing.assert_array_equal(floating(keys)[:, -5:], rounded(tokens[0], kind))
    np.testing.assert_array_equal(floating(seen)[:, :5], floating(keys)[:, -5:])
    jax.tree.map(np.testing.assert_array_equal, at_once.keys, one_by_one.keys)


def test_attention_over_a_quantized_cache_is_that_over_its_values():
    q, given = drawn(B, 2, 2 * N, H), drawn(2, B, 5, N, H)
    k, v = (quantize(x, jnp.int8, jnp.float32) for x in given)
    mask = AttentionMask(
        query_segments=jnp.zeros((B, 2), jnp.int32),
        key_segments=jnp.zeros((B, 5), jnp.int32),
        offset=3,
    )
    found = attend(q, k, v, mask=mask, scale=0.5, softcap=2.0)
    plain = (dequantize(x, jnp.float32) for x in (k, v))
    expected = attend(q, *plain, mask=mask, scale=0.5, softcap=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Device:
    """What `fp8_problem` reads of a device."""

    def __init__(self, platform, device_kind, compute_capability=None):
        self.platform, self.device_kind = platform, device_kind
        if compute_capability:
            self.compute_capability = compute_capability


def test_fp8_is_for_chips_that_compute_in_it():
    for device in (
        Device("cpu", "cpu"),
        Device("gpu", "NVIDIA H200", "9.0"),
        Device("gpu", "NVIDIA L4", "8.9"),
        Device("tpu", "TPU7x"),
    ):
        assert fp8_problem(device) is None
    for device in (Device("gpu", "NVIDIA A100", "8.0"), Device("tpu", "TPU v5 lite")):
        assert "use int8" in fp8_problem(device)
        assert device.device_kind in fp8_problem(device)
