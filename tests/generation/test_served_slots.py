"""The choice of tokens where every sequence has settings of its own."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.generation.decoding import DecodingConfig, PromptInfo, choose_token
from speechlm2_jax.generation.served_slots import OwnSampling, _choose
from speechlm2_jax.inference.request.generation_request import read_request
from speechlm2_jax.serving.device import NEUTRAL, _check_defaults
from speechlm2_jax.settings import SettingsError


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


FILES = [
    {"min_p": 0.3},
    {"top_h": 0.4},
    {"typical_p": 0.5, "repetition_penalty": 1.2},
    {"epsilon_cutoff": 0.02, "eta_cutoff": 0.3},
]


def model_of(file):
    return SimpleNamespace(
        text_eos_id=0, text_pad_id=0, text_vocab_size=30, end_ids=(0,), generation_defaults=file
    )


@pytest.mark.parametrize("file", FILES)
def test_truncations_of_the_models_file_come_after_the_temperature_of_sampled_jobs(file):
    """As in `generate`; greedy jobs of the same batch have none."""
    rows, drawn = 16, dict(temperature=1.7, top_p=0.8)
    config = read_request(model_of(file), {"do_sample": True, **NEUTRAL}).decoding
    config = replace(config, max_new_tokens=4)
    scores = jax.random.normal(jax.random.key(1), (rows, 30)) * 2
    ids, generated = jnp.full((rows, 4), 3), jnp.full(rows, 2)
    zero, is_sampled = jnp.zeros(rows, jnp.int32), jnp.arange(rows) % 4 != 0
    info = PromptInfo(position=zero, length=zero, first=zero, limit=zero + 4)
    rngs = jax.random.split(jax.random.key(0), rows)
    own = OwnSampling(is_sampled, *(jnp.full(rows, v) for v in drawn.values()), zero == 1)
    found, _ = jax.jit(_choose)(scores, ids, generated, info, (rngs, own), config)

    def alone(keys, row, rng):
        asked = replace(read_request(model_of(file), keys).decoding, max_new_tokens=4)
        one = jax.tree.map(lambda x: x[row], info)
        return choose_token(scores[row], ids[row], generated[row], one, rng, asked)

    sampled = {"do_sample": True, "top_k": 0, **drawn}
    expected = [
        alone(sampled, row, rngs[row]) if is_sampled[row] else alone({}, row, None)
        for row in range(rows)
    ]
    np.testing.assert_array_equal(found, jnp.stack(expected))
    assert int((found != jnp.argmax(scores, axis=-1)).sum()) > 0


UNSUPPORTED = [{"num_beams": 4}, {"prompt_lookup_num_tokens": 3}, {"stop_strings": "x"}]


@pytest.mark.parametrize("file", UNSUPPORTED)
def test_what_the_models_file_asks_for_and_slots_do_not_do_is_refused_at_the_start(file):
    request = read_request(model_of(file), {"do_sample": True, **NEUTRAL})
    (key,) = file
    with pytest.raises(SettingsError, match=f"generation_config.json of the LLM: {key}="):
        _check_defaults(request, file)
