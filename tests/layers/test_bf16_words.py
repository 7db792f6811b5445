"""bf16 weights as words: the same numbers as fp32 weights, without an fp32 copy of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.inference.probe import compare, probe_llm
from speechlm2_jax.layers import words
from speechlm2_jax.layers.linear import Embedding, Linear
from speechlm2_jax.layers.module import merge, split
from speechlm2_jax.layers.stack import scan_layers, stack
from speechlm2_jax.layers.unstacked import LayerViews, merge_layers
from speechlm2_jax.layers.words import floats, is_words, matmul_narrow, words_of
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder

LAYERS, WIDTH, TURNS = 3, 64, 4


def drawn(*shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,)])
def test_a_matmul_of_words_is_that_of_their_floats(count, rows, monkeypatch):
    monkeypatch.setattr(words, "CHUNK_ELEMENTS", 16 * 24)  # 16 rows at a time
    weight, x = drawn(count, 24), drawn(*rows, 24, dtype="float32")
    found = matmul_narrow(x, words_of(weight))
    expected = np.asarray(x) @ np.asarray(weight, np.float32).T
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    narrow = matmul_narrow(x.astype(jnp.bfloat16), words_of(weight))
    wide = matmul_narrow(x.astype(jnp.bfloat16), words_of(weight), preferred_element_type="float32")
    assert narrow.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_floats_of_words_are_all_the_floats_that_there_are():
    every = np.arange(1 << 16, dtype=np.uint16)
    given = jax.device_put(every.view(jnp.bfloat16))
    np.testing.assert_array_equal(floats(words_of(given), jnp.float32), given.astype(jnp.float32))
    assert words_of(given).unsafe_buffer_pointer() == given.unsafe_buffer_pointer()


class Tower(nnx.Module):
    """A table and a stack of layers."""

    def __init__(self, rngs: nnx.Rngs):
        def make(layer_rngs: nnx.Rngs) -> Linear:
            return Linear(WIDTH, WIDTH, axes=(None, None), rngs=layer_rngs)

        self.table = Embedding(5, WIDTH, rngs=rngs)
        self.layers = stack(make, LAYERS, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        return scan_layers(self.layers, body, x, remat="none")[0]


def looped(graphdef, variables, ids):
    tower = merge_layers(graphdef, variables)
    x = tower.table(ids).astype(jnp.float32)
    return jax.lax.fori_loop(0, TURNS, lambda _, x: tower(x), x)


@pytest.fixture(scope="module")
def tower():
    graphdef, variables = split(Tower(nnx.Rngs(0)))
    return graphdef, {path: x.astype(jnp.bfloat16) for path, x in variables.items()}


def test_bf16_weights_of_matmuls_become_words_and_others_stay(tower):
    graphdef, variables = tower
    views = LayerViews("layers.")
    whole, by_layer = views.whole(graphdef, variables), views(graphdef, variables)
    assert {p for p, x in whole.items() if is_words(x)} == {"layers.weight", "table.weight"}
    assert whole["layers.bias"] is variables["layers.bias"]
    assert whole["layers.weight"].shape == (LAYERS, WIDTH, WIDTH)
    address = variables["layers.weight"].unsafe_buffer_pointer()
    for n, view in enumerate(by_layer["layers.weight"]):
        assert is_words(view)
        assert view.unsafe_buffer_pointer() == address + n * WIDTH * WIDTH * 2
    fp32 = {path: x.astype(jnp.float32) for path, x in variables.items()}
    assert not any(is_words(x) for x in LayerViews("").whole(graphdef, fp32).values())


@pytest.mark.parametrize("name", ["whole", "by layer"])
def test_a_loop_holds_no_floats_of_all_weights(tower, name):
    graphdef, variables = tower
    views = LayerViews("layers.")
    given = views.whole(graphdef, variables) if name == "whole" else views(graphdef, variables)
    ids = jnp.array([3])
    program = jax.jit(looped, static_argnums=0)
    size = LAYERS * WIDTH * WIDTH * 2
    held = program.lower(graphdef, given, ids).compile().memory_analysis().temp_size_in_bytes
    plain = program.lower(graphdef, variables, ids).compile().memory_analysis().temp_size_in_bytes
    assert held < size < 2 * size <= plain  # the least that shows the reason for words
    fp32 = {path: x.astype(jnp.float32) for path, x in variables.items()}
    np.testing.assert_allclose(
        program(graphdef, given, ids), program(graphdef, fp32, ids), rtol=1e-5, atol=1e-6
    )


def test_an_llm_of_words_computes_what_its_floats_do():
    config = DecoderConfig(
        vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48
    )
    variables = split(Decoder(config, rngs=nnx.Rngs(0)))[1]
    narrow = {path: x.astype(jnp.bfloat16) for path, x in variables.items()}
    wide = {path: x.astype(jnp.float32) for path, x in narrow.items()}
    assert compare(probe_llm(config, wide), probe_llm(config, narrow), None).is_small


def test_merge_accepts_words(tower):
    graphdef, variables = tower
    network = merge(graphdef, LayerViews("").whole(graphdef, variables))
    assert network.table(jnp.array([1])).dtype == jnp.bfloat16
