"""The choice of tokens where every sequence has settings of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from speechlm2_jax.generation.decoding import DecodingConfig, PromptInfo
from speechlm2_jax.generation.served_slots import OwnSampling, _choose


def test_a_sequence_that_avoids_loops_repeats_no_4_gram():
    ids = jnp.asarray([[1, 2, 3, 4, 1, 2, 3, 0, 0, 0]] * 3 + [[1, 2, 9, 4, 1, 2, 3, 0, 0, 0]])
    scores = jnp.tile(jnp.arange(10.0)[None] % 5, (4, 1)).at[:, 9].set(-1.0)  # 4, then 3
    avoids = jnp.asarray([True, False, True, True])
    generated, zero = jnp.asarray([7, 7, 6, 7]), jnp.zeros(4, jnp.int32)
    sampling = OwnSampling(jnp.zeros(4, bool), jnp.ones(4), jnp.ones(4), avoids)
    rngs = jax.random.split(jax.random.key(0), 4)
    info = PromptInfo(position=zero, length=zero, first=zero, limit=zero + 10)
    config = DecodingConfig(max_new_tokens=10, stop_ids=(0,), pad_id=0, do_sample=True)
    token, _ = _choose(scores, ids, generated, info, (rngs, sampling), config)
    np.testing.assert_array_equal(token, [3, 4, 4, 4])
