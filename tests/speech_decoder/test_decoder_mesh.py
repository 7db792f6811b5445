"""The speech decoder on eight devices gives what one device gives."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.module import Variables, describe, merge
from speechlm2_jax.sharding import RULES, Sharding, make_sharding, place, use
from speechlm2_jax.speech_decoder import feed_forward
from tests.speech_decoder.small_decoder import (
    CODES,
    DROPPING,
    GUIDED,
    inputs,
    sequence_rngs,
    weights,
)

ATOL = 1e-5  # sums over devices round otherwise
GRADIENT_RTOL = 1e-5
ROWS, STEPS = 8, 8
MESHES = {
    "data=8": dict(data=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=2 tensor=2 sequence context=2": dict(fsdp=2, tensor=2, context=2, sequence_parallel=True),
}
HIDDEN, TOKENS = inputs(ROWS, STEPS)
MASK = jnp.arange(STEPS)[None] < jnp.asarray([8, 5, 8, 8, 3, 8, 8, 1])[:, None]


@partial(jax.jit, static_argnames=("graphdef", "sharding"))
def learn(
    graphdef: Any, variables: Variables, batch: tuple[Any, ...], sharding: Sharding | None
) -> tuple[jax.Array, tuple[Variables, jax.Array]]:
    """The loss of training with dropout and without some hidden states, and its gradients."""
    hidden, codes, mask, rngs = batch

    def loss(variables: Variables, hidden: jax.Array) -> jax.Array:
        network = merge(graphdef, variables)
        logits = network(hidden, codes, mask=mask, train=True, rngs=rngs)
        chances = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
        return -jnp.mean(jnp.where(mask[..., None, None], chances, 0.0))

    with use(sharding):
        return jax.value_and_grad(loss, argnums=(0, 1))(variables, hidden)


@partial(jax.jit, static_argnames=("graphdef", "sharding"))
def score(
    graphdef: Any, variables: Variables, batch: tuple[Any, ...], sharding: Sharding | None
) -> jax.Array:
    hidden, codes, mask, _ = batch
    with use(sharding):
        return merge(graphdef, variables)(hidden, codes, mask=mask)


@partial(jax.jit, static_argnames=("graphdef", "sharding"))
def follow(
    graphdef: Any, variables: Variables, batch: tuple[Any, ...], sharding: Sharding | None
) -> jax.Array:
    """The codes that the decoder generates from its own, one frame at a time."""
    hidden, codes, _, _ = batch
    with use(sharding):
        network = merge(graphdef, variables)

        def one(carry: Any, hidden: jax.Array) -> Any:
            state, codes = carry
            logits, state = network.step(state, hidden[:, None], codes)
            codes = jnp.argmax(logits, axis=-1).astype(codes.dtype)
            return (state, codes), codes[:, 0]

        start = (network.new_state(ROWS, STEPS, jnp.float32), codes[:, :1])
        return jax.lax.scan(one, start, hidden.swapaxes(0, 1))[1]


def placed(sharding: Sharding, graphdef: Any, variables: Variables) -> tuple[Any, Any, Any]:
    """Weights and batch sharded over the mesh, and the order of time on it."""
    axes = {path: info.axes for path, info in describe(merge(graphdef, variables)).items()}
    order = sharding.time_order(STEPS)
    order = np.arange(STEPS) if order is None else order
    batch = [
        jax.device_put(x[:, order], sharding.named(("batch", "tokens", *(None,) * (x.ndim - 2))))
        for x in (HIDDEN, TOKENS, MASK)
    ]
    rngs = jax.device_put(sequence_rngs(ROWS), sharding.named(("batch",)))
    return place(variables, axes, sharding), (*batch, rngs), order


@pytest.mark.parametrize(
    "mesh", [pytest.param("data=8", marks=pytest.mark.slow), *list(MESHES)[1:]]
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(mesh: str, capfd) -> None:
    graphdef, variables = weights(DROPPING)
    sharding = make_sharding(**MESHES[mesh])
    whole = (HIDDEN, TOKENS, MASK, sequence_rngs(ROWS))
    expected, (of_weights, of_hidden) = learn(graphdef, variables, whole, None)
    there, batch, order = placed(sharding, graphdef, variables)
    program = learn.lower(graphdef, there, batch, sharding).compile()
    loss, (gradients, of_inputs) = program(there, batch)
    np.testing.assert_allclose(loss, expected, rtol=ATOL)
    np.testing.assert_allclose(of_inputs, of_hidden[:, order], atol=ATOL)
    for path, theirs in of_weights.items():
        tolerance = GRADIENT_RTOL * max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(gradients[path], theirs, atol=tolerance, err_msg=path)
    assert "rematerialization" not in capfd.readouterr().err
    if sharding.context_size == 1:
        assert not re.findall(r"\ball-to-all(?:-start)?\(", program.as_text())
    if sharding.data_parallel_size == 8:
        # weights are whole on every device, so any all-gather would be one of activations
        assert not re.findall(r"\ball-gather(?:-start)?\(", program.as_text())


@pytest.mark.parametrize("convolves_as", [pytest.param("cpu", marks=pytest.mark.slow), "tpu"])
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_scores_do_not_depend_on_the_mesh(mesh: str, convolves_as: str, monkeypatch) -> None:
    monkeypatch.setattr(feed_forward, "platform", lambda: convolves_as)
    score.clear_cache()
    graphdef, variables = weights(GUIDED)
    sharding = make_sharding(**MESHES[mesh])
    expected = score(graphdef, variables, (HIDDEN, TOKENS, MASK, None), None)
    there, batch, order = placed(sharding, graphdef, variables)
    scores = score(graphdef, there, (*batch[:3], None), sharding)
    np.testing.assert_allclose(scores, expected[:, order], atol=ATOL)


def test_codes_taken_step_by_step_do_not_depend_on_the_mesh() -> None:
    graphdef, variables = weights(GUIDED)
    sharding = make_sharding(data=2, fsdp=2, tensor=2)
    expected = follow(graphdef, variables, (HIDDEN, TOKENS, None, None), None)
    there, batch, _ = placed(sharding, graphdef, variables)
    taken = follow(graphdef, there, (*batch[:2], None, None), sharding)
    np.testing.assert_array_equal(taken, expected)
    assert len(np.unique(expected)) > CODES / 2


def test_every_axis_of_every_variable_is_known() -> None:
    known = {name for name, _ in RULES}
    for path, info in describe(merge(*weights(GUIDED))).items():
        assert {axis for axis in info.axes if axis is not None} <= known, path
