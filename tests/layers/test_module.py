"""Modules with and without values; initial values are drawn by one program."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.module import abstract, describe, param, split
from speechlm2_jax.layers.stack import stack


class Layer(nnx.Module):
    def __init__(self, rngs):
        normal, uniform = nnx.initializers.normal(0.02), nnx.initializers.uniform(0.1)
        self.weight = param(rngs, (48, 33), ("mlp", "embed"), normal)
        self.bias = param(rngs, (48,), ("mlp",), uniform)
        self.kernel = param(rngs, (3, 5, 7), (None, None, None), nnx.initializers.he_uniform())


def test_a_module_without_values_is_described_as_one_with_values():
    def make(rngs):
        return stack(lambda rngs: stack(Layer, 2, rngs), 3, rngs)

    drawn, undrawn = make(nnx.Rngs(5)), abstract(make)
    assert describe(undrawn) == describe(drawn)
    assert split(undrawn)[0] == split(drawn)[0]
    assert describe(undrawn)["weight"].shape == (3, 2, 48, 33)
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in split(undrawn)[1].values())


def test_quick_compilation_changes_no_bit_of_the_values_drawn(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # tests compile with no optimisation at all

    def make():
        return split(stack(Layer, 3, nnx.Rngs(5)))[1]

    drawn = draw(make)
    usual = jax.jit(make, compiler_options={"xla_backend_optimization_level": 3})()
    assert drawn.keys() == usual.keys()
    for path, value in usual.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(drawn[path], value)
