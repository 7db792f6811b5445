"""x Wᵀ, whatever the order of the operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.cpu import FEW_ROWS
from speechlm2_jax.layers.linear import matmul


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 1, 8), (4, 8, 8), (3, 11, 8), (8,)])
def test_matmul_is_x_times_the_transposed_weight(shape):
    random = np.random.default_rng(0)
    x, weight = random.normal(size=shape), random.normal(size=(5, 8))
    given = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
    np.testing.assert_allclose(matmul(*given), x @ weight.T, atol=1e-5)
    gradients = jax.grad(lambda x, w: jnp.sum(matmul(x, w)), argnums=(0, 1))(*given)
    np.testing.assert_allclose(gradients[0], np.ones((*shape[:-1], 5)) @ weight, atol=1e-5)
    rows = np.ones((x.size // 8, 5)).T @ x.reshape(-1, 8)
    np.testing.assert_allclose(gradients[1], rows, atol=1e-5)


@pytest.mark.parametrize("rows, left", [(2, "weight"), (FEW_ROWS, "weight"), (FEW_ROWS + 1, "x")])
def test_few_rows_have_the_weight_on_the_left_on_a_cpu(rows, left):
    x, weight = jnp.ones((rows, 64)), jnp.ones((96, 64))
    text = jax.jit(matmul).lower(x, weight).compile().as_text()
    made = f"f32[96,{rows}]" if left == "weight" else f"f32[{rows},96]"
    matmuls = [line for line in text.splitlines() if " dot(" in line]
    assert matmuls and all(made in line.split(" dot(")[0] for line in matmuls)
