"""The decoder on eight devices gives what one device gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.generation.salm import DecodingConfig, generate_tokens
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import Variables, describe, merge, split
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.sharding import Sharding, make_sharding, place, use

ATOL = 1e-5  # sums over devices round otherwise
CONFIG = DecoderConfig(
    vocab_size=64,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=32,
    init_std=0.3,
)
MODULE = Decoder(CONFIG, rngs=nnx.Rngs(0), lora=LoraConfig(r=2))
DEFINITION, VARIABLES = split(MODULE)
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
IDS = jax.random.randint(jax.random.key(0), (8, 6), 1, CONFIG.vocab_size)


@partial(jax.jit, static_argnames="sharding")
def loss_and_gradients(
    variables: Variables, ids: jax.Array, sharding: Sharding | None
) -> tuple[jax.Array, Variables]:
    def loss(variables: Variables) -> jax.Array:
        decoder: Decoder = merge(DEFINITION, variables)
        hidden = decoder(
            decoder.embed(ids),
            positions=jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), ids.shape),
            segments=jnp.ones_like(ids),
            attention_mask=jnp.ones(ids.shape, bool),
        )
        scores = jax.nn.log_softmax(decoder.logits(hidden)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    with use(sharding):
        return jax.value_and_grad(loss)(variables)


@partial(jax.jit, static_argnames="sharding")
def generate(variables: Variables, ids: jax.Array, sharding: Sharding | None) -> jax.Array:
    with use(sharding):
        decoder: Decoder = merge(DEFINITION, variables)
        return generate_tokens(
            decoder,
            decoder.embed(ids),
            lengths=jnp.full(ids.shape[0], 6),
            attention_mask=jnp.ones(ids.shape, bool),
            config=DecodingConfig(max_new_tokens=4, stop_ids=(), pad_id=0),
        )


def placed(sharding: Sharding) -> tuple[Variables, jax.Array]:
    axes = {path: info.axes for path, info in describe(MODULE).items()}
    ids = jax.device_put(IDS, sharding.named(("batch", "time")))
    return place(VARIABLES, axes, sharding), ids


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    sizes: dict[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    sharding = make_sharding(**sizes)
    expected, expected_gradients = loss_and_gradients(VARIABLES, IDS, None)
    loss, gradients = loss_and_gradients(*placed(sharding), sharding)
    np.testing.assert_allclose(loss, expected, rtol=ATOL)
    for path, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], gradient, atol=ATOL, err_msg=path)
    assert "rematerialization" not in capfd.readouterr().err


def test_generated_tokens_do_not_depend_on_the_mesh() -> None:
    sharding = make_sharding(**MESHES[-1])
    expected = generate(VARIABLES, IDS, None)
    np.testing.assert_array_equal(generate(*placed(sharding), sharding), expected)
