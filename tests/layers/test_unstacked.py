"""A loop over a stack reads its layers in place, and computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers import unstacked
from speechlm2_jax.layers.linear import Embedding
from speechlm2_jax.layers.module import param, split
from speechlm2_jax.layers.stack import scan_layers, stack
from speechlm2_jax.layers.unstacked import LayerViews, merge_layers, read_in_place
from speechlm2_jax.sharding import for_inference, make_sharding, use

LAYERS, WIDTH, TURNS = 3, 4, 5


class Layer(nnx.Module):
    """x @ weight."""

    def __init__(self, rngs):
        init = jax.nn.initializers.normal()
        self.weight = param(rngs, (WIDTH, WIDTH), (None, None), init)


class Tower(nnx.Module):
    """A stack under another module."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        for variable in (self.inner.kernel, self.inner.bias):
            assert variable is not None
            variable.set_metadata(axes=(None,) * variable.ndim)
        self.layers = stack(Layer, LAYERS, rngs)

    def __call__(self, x):
        def body(layer, x, scale):
            return jnp.tanh(x + scale * (x @ layer.weight[...])), x.sum()

        return scan_layers(self.layers, body, x, jnp.arange(1.0, LAYERS + 1), remat="none")


def looped(tower, x, *, in_place):
    def turn(_, carry):
        x, total = carry
        x, sums = tower(x)
        return x, total + sums

    tower = read_in_place(tower) if in_place else tower
    return jax.lax.fori_loop(0, TURNS, turn, (x, jnp.zeros(LAYERS)))


@pytest.fixture
def tower():
    return Tower(nnx.Rngs(0))


def program(tower, *, in_place):
    graphdef, state = nnx.split(tower)
    call = jax.jit(lambda s, x: looped(nnx.merge(graphdef, s), x, in_place=in_place))
    return call, state


def test_the_same_numbers_without_a_scan_inside_the_loop(tower):
    x = jnp.ones((2, WIDTH))
    results = []
    for in_place, loops in ((False, 2), (True, 1)):
        call, state = program(tower, in_place=in_place)
        assert str(jax.make_jaxpr(call)(state, x)).count("scan[") == loops
        results.append(call(state, x))
    for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_stack_that_is_too_large_to_hold_twice_stays_one(tower, monkeypatch):
    monkeypatch.setattr(unstacked, "MAX_UNSTACKED_BYTES", LAYERS * WIDTH * WIDTH * 4 - 1)
    call, state = program(tower, in_place=True)
    assert str(jax.make_jaxpr(call)(state, jnp.ones((2, WIDTH)))).count("scan[") == 2


def test_outside_the_loop_nothing_is_taken_apart(tower):
    read_in_place(tower)
    assert str(jax.make_jaxpr(lambda x: tower(x))(jnp.ones((2, WIDTH)))).count("scan[") == 1


class Tables(nnx.Module):
    """One table per codebook: an axis of the same name, but nothing that is scanned."""

    def __init__(self, rngs):
        init = jax.nn.initializers.normal()
        self.weight = param(rngs, (LAYERS, WIDTH), ("layers", None), init)

    def __call__(self):
        return self.weight[...].sum(0)


def test_modules_that_are_no_stacks_stay_as_they_are(tower):
    tower.tables = nnx.data(Tables(nnx.Rngs(1)))
    np.testing.assert_array_equal(read_in_place(tower).tables(), tower.tables())


def called(tower_graphdef, variables, x):
    return looped(merge_layers(tower_graphdef, variables), x, in_place=True)


def test_views_share_the_memory_of_their_stack_and_compute_the_same(tower):
    graphdef, variables = split(tower)
    variables["layers.weight"] = jax.device_put(np.arange(3 * 4 * 4, dtype=np.float32)).reshape(
        LAYERS, WIDTH, WIDTH
    )
    views = LayerViews("layers.")(graphdef, variables)
    stack_at = variables["layers.weight"].unsafe_buffer_pointer()
    for n, view in enumerate(views["layers.weight"]):
        assert view.unsafe_buffer_pointer() == stack_at + n * WIDTH * WIDTH * 4
    assert views["inner.kernel"] is variables["inner.kernel"]
    x = jnp.ones((2, WIDTH))
    program = jax.jit(called, static_argnums=0)
    assert str(jax.make_jaxpr(program, static_argnums=0)(graphdef, views, x)).count("scan[") == 1
    expected, actual = program(graphdef, variables, x), program(graphdef, views, x)
    np.testing.assert_array_equal(actual[0], expected[0])


def test_views_are_kept_until_the_variables_change(tower):
    graphdef, variables = split(tower)
    views = LayerViews("layers.")
    first = views(graphdef, variables)["layers.weight"]
    assert views(graphdef, dict(variables))["layers.weight"] is first
    changed = {**variables, "layers.weight": variables["layers.weight"] * 2}
    second = views(graphdef, changed)["layers.weight"]
    np.testing.assert_array_equal(second[1], 2 * first[1])


def test_only_the_named_part_on_one_cpu_is_taken_apart(tower):
    graphdef, variables = split(tower)
    assert LayerViews("inner.")(graphdef, variables)["layers.weight"] is variables["layers.weight"]
    shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in variables.items()}
    assert LayerViews("layers.")(graphdef, shapes) is shapes


def test_embeddings_of_a_stack_are_looked_up_where_they_lie_on_a_mesh():
    tables = stack(lambda rngs: Embedding(16, 8, rngs=rngs), LAYERS, nnx.Rngs(0))
    ids = jnp.arange(12).reshape(LAYERS, 4)

    def add(table, total, row):
        return total + table(row), None

    def total(tables, ids):
        return scan_layers(tables, add, jnp.zeros((4, 8)), ids, remat="none")[0]

    expected = total(tables, ids)
    graphdef, state = nnx.split(tables)
    with use(for_inference(make_sharding(fsdp=4, tensor=2).mesh)):
        apart = jax.jit(lambda s, i: total(read_in_place(nnx.merge(graphdef, s)), i))(state, ids)
    np.testing.assert_allclose(apart, expected, rtol=1e-6)
