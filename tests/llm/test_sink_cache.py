"""Sequences without end: first tokens and a ring of last ones give attention to exactly these."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers.rope import LongRopeScaling, RopeConfig, YarnScaling
from speechlm2_jax.llm.caches import endless_problem
from speechlm2_jax.llm.config import DecoderConfig, LayerKind
from speechlm2_jax.llm.decoder import Decoder

ATOL = 1e-5
SINKS, CAPACITY, TOKENS = 2, 8, 23
YARN = YarnScaling(factor=4.0, original_positions=16, attention_factor=1.2)
PLAIN = DecoderConfig(
    vocab_size=11,
    width=16,
    layers=1,
    heads=4,
    kv_heads=2,
    head_width=6,
    mlp_width=20,
    qk_norm="head",
    init_std=0.3,
)
CASES = {
    "plain": PLAIN,
    "a norm after the rotation, and YaRN": replace(
        PLAIN, qk_norm="head_after_rope", rope=RopeConfig(theta=100.0, scaling=YARN)
    ),
    "neighbours are pairs, and a part is rotated": replace(
        PLAIN, qk_norm="none", rope=RopeConfig(interleaved=True, width=4)
    ),
    "no rotary positions": replace(PLAIN, pattern=(LayerKind(has_rope=False),)),
}


def decoder_of(config):
    return Decoder(config, rngs=nnx.Rngs(0))


def embeds(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, TOKENS, PLAIN.width))


def one_by_one(decoder, cache, tokens):
    """Hidden states [B, T, D] of tokens that are run one after the other."""

    def step(cache, token):
        output = decoder.extend(
            token[:, None],
            cache,
            positions=cache.used[:, None],
            attention_mask=jnp.ones((len(token), 1), bool),
        )
        return output.cache, output.hidden[:, 0]

    cache, hidden = jax.jit(lambda c, x: jax.lax.scan(step, c, x.swapaxes(0, 1)))(cache, tokens)
    return hidden.swapaxes(0, 1), cache


def whole(decoder, tokens):
    shape = tokens.shape[:2]
    return jax.jit(decoder)(
        tokens,
        positions=jnp.broadcast_to(jnp.arange(shape[1]), shape),
        segments=jnp.ones(shape, jnp.int32),
        attention_mask=jnp.ones(shape, bool),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_token_attends_to_the_sinks_as_if_they_came_just_before_the_window(name):
    decoder, x = decoder_of(CASES[name]), embeds()
    cache = decoder.sink_cache(2, CAPACITY, jnp.float32, SINKS)
    hidden, cache = one_by_one(decoder, cache, x)
    assert cache.used.tolist() == [TOKENS] * 2
    window = CAPACITY - SINKS
    rows = [jnp.concatenate([x[:, :SINKS], x[:, t + 1 - window : t + 1]], 1) for t in range(8, 23)]
    expected = whole(decoder, jnp.concatenate(rows))[:, -1].reshape(len(rows), 2, -1)
    np.testing.assert_allclose(hidden[:, 8:].swapaxes(0, 1), expected, atol=ATOL)


def test_until_the_cache_is_full_all_tokens_are_attended_to():
    kinds = (LayerKind(), LayerKind(window=3), LayerKind(has_rope=False))
    decoder, x = decoder_of(replace(PLAIN, layers=3, pattern=kinds)), embeds()
    cache = decoder.sink_cache(2, CAPACITY, jnp.float32, SINKS)
    hidden, _ = one_by_one(decoder, cache, x)
    expected = whole(decoder, x)
    np.testing.assert_allclose(hidden[:, :CAPACITY], expected[:, :CAPACITY], atol=ATOL)
    assert np.abs(hidden - expected)[:, CAPACITY:].max() > 1e-2


@pytest.mark.parametrize("kinds", [(LayerKind(),), (LayerKind(window=3),)])
def test_a_sequence_whose_token_is_padding_stays_as_it_is(kinds):
    decoder, x = decoder_of(replace(PLAIN, pattern=kinds)), embeds()
    cache = decoder.sink_cache(2, CAPACITY, jnp.float32, SINKS)
    expected, _ = one_by_one(decoder, cache, x)

    @jax.jit
    def step(cache, taken, is_real):
        return decoder.extend(
            x[jnp.arange(2), jnp.minimum(taken, TOKENS - 1)][:, None],
            cache,
            positions=cache.used[:, None],
            attention_mask=is_real[:, None],
        )

    random, taken = np.random.default_rng(0), np.zeros(2, int)
    while (taken < TOKENS).any():
        is_real = (random.random(2) < 0.6) & (taken < TOKENS)
        output, before = step(cache, taken, is_real), cache
        cache = output.cache
        for row in np.flatnonzero(is_real):
            found = output.hidden[row, 0]
            np.testing.assert_allclose(found, expected[row, taken[row]], atol=ATOL)
        for row in np.flatnonzero(~is_real):
            np.testing.assert_array_equal(cache.keys[:, row], before.keys[:, row])
            np.testing.assert_array_equal(cache.key_mask[row], before.key_mask[row])
        taken += is_real
    assert cache.used.tolist() == [TOKENS] * 2


def test_a_quantized_cache_has_sinks_too():
    decoder, x = decoder_of(PLAIN), embeds()
    expected, _ = one_by_one(decoder, decoder.sink_cache(2, CAPACITY, jnp.float32, SINKS), x)
    decoder.kv_cache_kind = "int8"
    found, _ = one_by_one(decoder, decoder.sink_cache(2, CAPACITY, jnp.float32, SINKS), x)
    assert 0 < np.abs(found - expected).max() < 0.1


def test_what_cannot_be_held_is_refused():
    decoder = decoder_of(PLAIN)
    cache = decoder.sink_cache(2, CAPACITY, jnp.float32, SINKS)
    with pytest.raises(ValueError, match="takes 1 token at a time, not 2"):
        cache.reserve(jnp.ones((2, 2), bool))
    for sinks in (0, CAPACITY):
        with pytest.raises(ValueError, match=f"{sinks} sinks must be at least 1"):
            decoder.sink_cache(2, CAPACITY, jnp.float32, sinks)
    short = (1.0, 1.0, 1.0)
    scaling = LongRopeScaling(
        short_factor=short, long_factor=short, original_positions=8, attention_factor=1.0
    )
    growing = replace(PLAIN, rope=RopeConfig(scaling=scaling))
    with pytest.raises(ValueError, match=r"LongRope\) depends on the length"):
        decoder_of(growing).sink_cache(2, CAPACITY, jnp.float32, SINKS)
    assert endless_problem(PLAIN) is None
