"""The canonical form of a program: names and orders are left out, the maths is not."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from tools.program_hashes.canonical import canonical

ROOT = Path(__file__).parents[2]
X, Y = jnp.ones((3, 4)), jnp.ones((4, 5))


def program(function, *arguments, **options):
    module = jax.jit(function, **options).lower(*arguments).compiler_ir("stablehlo")
    return canonical(module.operation.get_asm(enable_debug_info=False))


class First(NamedTuple):
    """Two matrices."""

    left: jax.Array
    right: jax.Array


class Second(NamedTuple):
    """The same under other names, the other way round."""

    b: jax.Array
    a: jax.Array


@jax.jit
def _activation(x):
    return jnp.where(x > 0, x, 0.1 * x)


@jax.jit
def _leaky(value):
    return jnp.where(value > 0, value, 0.1 * value)


def test_names_and_orders_are_left_out():
    def one(inputs):
        product = _activation(inputs.left @ inputs.right)
        return {"product": product, "sum": product.sum()}

    def other(given):
        z = _leaky(given.a @ given.b)
        return {"a_total": z.sum(), "z": z}

    assert program(one, First(X, Y)) == program(other, Second(b=Y, a=X))


def test_a_donated_argument_is_followed_to_its_result():
    def one(state, step):
        return state + step, step.sum()

    def other(step, state):
        moved = state + step
        return step.sum(), moved

    first = program(one, X, X, donate_argnums=0)
    assert first == program(other, X, X, donate_argnums=1)
    assert first != program(one, X, X)
    assert "tf.aliasing_output" in first.text


@pytest.mark.parametrize(
    "changed",
    [
        lambda x, y: _activation(x @ y) + 1e-6,
        lambda x, y: _activation((x @ y).astype(jnp.bfloat16)),
        lambda x, y: _activation(y.T @ x.T),
    ],
)
def test_other_maths_has_another_digest(changed):
    assert program(changed, X, Y).digest != program(lambda x, y: _activation(x @ y), X, Y).digest


@pytest.mark.slow  # compiles every program of every model, on one and on eight devices
def test_no_program_has_changed():
    command = [sys.executable, "-m", "tools.program_hashes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:]
