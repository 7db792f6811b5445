"""Choosing tokens: equal to transformers' warpers, and a row's draw is its own."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.generation.sampling import SamplingConfig, choose, warp

DATA = Path(__file__).parents[1] / "data" / "llm"
ATOL = 1e-5
SETTINGS = {
    "temperature": SamplingConfig(do_sample=True, temperature=0.7),
    "top_k": SamplingConfig(do_sample=True, top_k=5),
    "top_p": SamplingConfig(do_sample=True, top_p=0.8),
    "all": SamplingConfig(do_sample=True, temperature=0.6, top_k=12, top_p=0.9),
    "narrow": SamplingConfig(do_sample=True, temperature=1.3, top_k=3, top_p=0.05),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_warped_scores_equal_the_original(name: str) -> None:
    golden = load_file(DATA / "warpers.safetensors")
    warped = warp(jnp.asarray(golden["logits"]), SETTINGS[name])
    np.testing.assert_allclose(warped, golden[name], atol=ATOL)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = jnp.asarray([[0.0, 3.0, 3.0], [9.0, 1.0, 2.0]])
    np.testing.assert_array_equal(choose(logits, SamplingConfig(temperature=0.1)), [1, 0])


def test_a_draw_depends_on_its_own_row_and_key_only() -> None:
    draw = jax.jit(partial(choose, config=SETTINGS["all"]))
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    rngs = jax.random.split(jax.random.key(1), 6)
    together = draw(logits, rngs=rngs)
    for row in range(6):
        alone = draw(logits[row : row + 1], rngs=rngs[row : row + 1])
        assert alone[0] == together[row]


def test_draws_follow_the_warped_distribution() -> None:
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    config = SamplingConfig(do_sample=True, top_k=3)
    draws = choose(
        jnp.broadcast_to(logits, (8000, 4)), config, jax.random.split(jax.random.key(2), 8000)
    )
    shares = np.bincount(draws, minlength=4) / 8000
    np.testing.assert_allclose(shares, np.asarray([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.02)


def test_sampling_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="random keys"):
        choose(jnp.zeros((1, 3)), SamplingConfig(do_sample=True))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_k": -2}, {"top_p": -0.1}])
def test_values_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(do_sample=True, **wrong)
