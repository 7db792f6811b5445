"""Invariants of the speech decoder: padding, neighbours, draws, guidance, steps, dtypes."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers.module import Variables, describe, merge
from speechlm2_jax.speech_decoder import attention, feed_forward
from speechlm2_jax.speech_decoder.transformer import PADDING, TransformerState
from tests.speech_decoder.small_decoder import (
    CODEBOOKS,
    CODES,
    CONFIG,
    DROPPING,
    GUIDED,
    STEPS,
    inputs,
    make,
    padded,
    scores,
    sequence_rngs,
    weights,
)

ATOL = 1e-5  # values are O(1); sums of other lengths round otherwise
SHOWS = 1e-2  # what must differ, differs by more


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Variables]:
    return weights(CONFIG)


@pytest.fixture(scope="module")
def guided() -> tuple[Any, Variables]:
    return weights(GUIDED)


@pytest.fixture(scope="module")
def dropping() -> tuple[Any, Variables]:
    return weights(DROPPING)


def test_padding_and_neighbours_change_no_score(guided) -> None:
    together = scores(*guided, *inputs())
    assert together.shape == (2, STEPS, CODEBOOKS, CODES)
    hidden, codes, mask = padded(*inputs(), 3)
    within = scores(*guided, hidden, codes, mask=mask)
    np.testing.assert_allclose(within[:, :STEPS], together, atol=ATOL)
    alone = scores(*guided, *(x[1:] for x in inputs()))
    np.testing.assert_allclose(alone, together[1:], atol=ATOL)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_neither_padding_nor_rematerialisation_changes_a_gradient(dropping, remat) -> None:
    graphdef, variables = dropping

    def loss(variables: Variables, hidden: jax.Array, codes: jax.Array, mask: Any, remat: Any):
        network = merge(graphdef, variables)
        how = {"train": True, "rngs": sequence_rngs(), "remat": remat}
        chances = jax.nn.log_softmax(network(hidden, codes, mask=mask, **how))
        return jnp.sum(chances[:, :STEPS, :, 3])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=4)
    expected, of_hidden = gradient(variables, *inputs(), None, "none")
    hidden, codes, mask = padded(*inputs(), 2, junk=50.0)
    ours, within = gradient(variables, hidden, codes, mask, remat)
    for path, theirs in expected.items():
        assert np.abs(theirs).max() > ATOL, path
        np.testing.assert_allclose(ours[path], theirs, atol=ATOL * 10, err_msg=path)
    np.testing.assert_allclose(within[:, :STEPS], of_hidden, atol=ATOL * 10)


def test_later_frames_have_no_influence(guided) -> None:
    hidden, codes = inputs()
    before = scores(*guided, hidden, codes)
    after = scores(*guided, hidden.at[:, 4].add(1.0), codes.at[:, 5:].set(0))
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=ATOL)
    assert np.abs(after - before)[:, 4:].max() > SHOWS


@pytest.mark.parametrize(
    ("taps", "parts"),
    [(1, (1,) * STEPS), (2, (STEPS,)), (3, (3, 1, 1, 2)), (2, (3, 1, 1, 2)), (3, (1,) * STEPS)],
    ids=str,
)
def test_decoding_step_by_step_equals_one_pass(taps: int, parts: tuple[int, ...]) -> None:
    graphdef, variables = weights(replace(GUIDED, kernel_size=taps))
    hidden, codes = inputs()
    mask = jnp.ones((2, STEPS), bool).at[0, 2].set(False).at[1, 5:].set(False)
    whole = scores(graphdef, variables, hidden, codes, mask=mask)
    network = merge(graphdef, variables)
    step = jax.jit(network.step)
    state, start, parts_of = network.new_state(2, STEPS, jnp.float32), 0, []
    for steps in parts:
        at = slice(start, start + steps)
        logits, state = step(state, hidden[:, at], codes[:, at], mask=mask[:, at])
        parts_of.append(logits)
        start += steps
    np.testing.assert_allclose(jnp.concatenate(parts_of, axis=1), whole, atol=ATOL)
    assert isinstance(state, TransformerState)
    assert state.cache.used == STEPS


def test_beyond_its_capacity_a_step_reads_the_first_frame_and_the_last_ones() -> None:
    """With one layer, a frame that left the ring and the convolution has no influence."""
    config = replace(GUIDED, n_layers=1, kernel_size=2, use_learnable_pos_emb=False)
    graphdef, variables = weights(config)
    network, (hidden, codes) = merge(graphdef, variables), inputs(length=12)

    @jax.jit
    def run(hidden: jax.Array) -> jax.Array:
        def step(state: Any, frame: Any) -> Any:
            output = network.step(state, *(x[:, None] for x in frame))
            return output.state, output.logits[:, 0]

        state = network.new_state(2, 5, jnp.float32, sinks=1)
        frames = (hidden.swapaxes(0, 1), codes.swapaxes(0, 1))
        return jax.lax.scan(step, state, frames)[1].swapaxes(0, 1)

    found = run(hidden)
    whole = scores(graphdef, variables, hidden, codes)
    np.testing.assert_allclose(found[:, :5], whole[:, :5], atol=ATOL)
    assert np.abs(found - whole)[:, 5:].max() > SHOWS
    last = 3 + 3 + 2  # of frame 3: in a ring of four, then in two convolutions
    changed = np.abs(run(hidden.at[:, 3].add(1.0)) - found)
    assert changed[:, last].max() > ATOL * 10 and changed[:, last + 1 :].max() < ATOL
    assert np.abs(run(hidden.at[:, 0].add(1.0)) - found)[:, last + 1 :].max() > ATOL * 10


def test_guidance_mixes_scores_with_and_without_hidden_states(guided) -> None:
    hidden, codes = inputs()
    with_hidden = scores(*guided, hidden, codes, train=True)
    graphdef, variables = weights(replace(GUIDED, cfg_unconditional_prob=1.0))
    without = scores(graphdef, variables, hidden, codes, train=True, rngs=sequence_rngs())
    expected = (1 - GUIDED.cfg_scale) * without + GUIDED.cfg_scale * with_hidden
    np.testing.assert_allclose(scores(*guided, hidden, codes), expected, atol=ATOL)
    assert np.abs(without - with_hidden).max() > SHOWS


def test_a_sequence_drops_hidden_states_by_its_own_key(guided) -> None:
    hidden, codes = (jnp.tile(x[:1], (64, 1, 1)) for x in inputs())
    rngs = sequence_rngs(64)
    drawn = scores(*guided, hidden, codes, train=True, rngs=rngs)
    with_hidden = scores(*guided, hidden[:1], codes[:1], train=True)
    is_without = np.abs(drawn - with_hidden).max(axis=(1, 2, 3)) > SHOWS
    assert 20 <= is_without.sum() <= 44  # 64 draws of one half: four standard deviations are 16
    backwards = scores(*guided, hidden, codes, train=True, rngs=rngs[::-1])
    np.testing.assert_allclose(backwards[::-1], drawn, atol=ATOL)


def test_draws_depend_on_the_key_of_the_sequence_only(dropping) -> None:
    rngs = sequence_rngs()
    hidden, codes = inputs()
    drawn = scores(*dropping, hidden, codes, train=True, rngs=rngs)
    alone = scores(*dropping, hidden[1:], codes[1:], train=True, rngs=rngs[1:])
    np.testing.assert_allclose(alone, drawn[1:], atol=ATOL)
    more, more_codes, mask = padded(hidden, codes, 4)
    longer = scores(*dropping, more, more_codes, mask=mask, train=True, rngs=rngs)
    np.testing.assert_allclose(longer[:, :STEPS], drawn, atol=ATOL)
    others = scores(*dropping, hidden, codes, train=True, rngs=sequence_rngs(seed=6))
    assert np.abs(others - drawn).max() > SHOWS
    evaluated = scores(*dropping, hidden, codes)
    np.testing.assert_array_equal(scores(*dropping, hidden, codes, rngs=rngs), evaluated)


@pytest.mark.parametrize("rate_of", ["p_dropout", "p_dropout_out"])
def test_each_rate_drops_something(rate_of: str) -> None:
    graphdef, variables = weights(replace(CONFIG, **{rate_of: 0.4}))
    hidden, codes = inputs()
    off = scores(graphdef, variables, hidden, codes, train=True)
    drawn = scores(graphdef, variables, hidden, codes, train=True, rngs=sequence_rngs())
    assert np.abs(drawn - off).max() > SHOWS


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_blocks_equals_attention_at_once(causal: bool, monkeypatch) -> None:
    config = replace(DROPPING, is_causal=causal)
    graphdef, variables = weights(config)
    hidden, codes, mask = padded(*inputs(), 2)
    how = {"mask": mask, "train": True, "rngs": sequence_rngs()}
    at_once = merge(graphdef, variables)(hidden, codes, **how)
    monkeypatch.setattr(attention, "BLOCK", 4)
    in_blocks = merge(graphdef, variables)(hidden, codes, **how)
    np.testing.assert_allclose(in_blocks, at_once, atol=ATOL)


@pytest.mark.parametrize("taps", [1, 3])
def test_the_convolution_of_a_tpu_equals_the_product_elsewhere(taps: int, monkeypatch) -> None:
    conv = feed_forward.CausalConvolution(
        5, 4, taps, axes=("mlp", "embed"), rngs=nnx.Rngs(0), init=jax.nn.initializers.normal(1.0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 5))
    product = conv(x)
    assert product.shape == (2, 7 - taps, 4)
    monkeypatch.setattr(feed_forward, "platform", lambda: "tpu")
    np.testing.assert_allclose(conv(x), product, atol=ATOL)


def test_attention_with_and_without_a_kernel_agree(plain) -> None:
    graphdef, variables = weights(replace(CONFIG, p_dropout=1e-9))
    hidden, codes, mask = padded(*inputs(), 2)
    dense = scores(graphdef, variables, hidden, codes, mask=mask, train=True, rngs=sequence_rngs())
    np.testing.assert_allclose(scores(*plain, hidden, codes, mask=mask), dense, atol=ATOL)


def test_detached_hidden_states_get_no_gradient_but_the_projection_does() -> None:
    graphdef, variables = weights(replace(CONFIG, detach_input=True))

    def total(variables: Variables, hidden: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(merge(graphdef, variables)(hidden, inputs()[1], train=True)))

    of_weights, of_hidden = jax.jit(jax.grad(total, argnums=(0, 1)))(variables, inputs()[0])
    assert not np.asarray(of_hidden).any()
    assert np.asarray(of_weights["projection.weight"]).any()


def test_without_codes_only_the_hidden_states_count() -> None:
    config = replace(CONFIG, cond_on_prev_audio_tokens=False)
    graphdef, variables = weights(config)
    assert not any(path.startswith("code_embeddings") for path in variables)
    hidden, codes = inputs()
    told = scores(graphdef, variables, hidden, codes)
    np.testing.assert_array_equal(told, merge(graphdef, variables)(hidden, None))
    with pytest.raises(ValueError, match=r"takes codes \[B, T, 4\]"):
        make(CONFIG)(hidden, None)


def test_no_dtype_is_promoted_silently(dropping) -> None:
    network = merge(*dropping)
    hidden, codes = inputs()

    def forward(hidden: jax.Array) -> tuple[jax.Array, ...]:
        state = network.new_state(2, STEPS, hidden.dtype)
        logits, state = network.step(state, hidden[:, :1], codes[:, :1])
        trained = network.decode(hidden, codes, train=True, rngs=sequence_rngs())
        return trained, network.logits(trained), logits, state.cache.keys, state.conv_state.hidden

    with jax.numpy_dtype_promotion("strict"):
        for dtype in ("float32", "bfloat16"):
            out = jax.eval_shape(forward, hidden.astype(dtype))
            assert [str(x.dtype) for x in out] == [dtype, "float32", "float32", dtype, dtype]


def test_more_frames_than_positions_is_an_error_that_names_the_key(plain) -> None:
    network = merge(*plain)
    limit = CONFIG.max_length_causal_mask
    beyond = limit + PADDING + 1
    with pytest.raises(ValueError, match="max_length_causal_mask"):
        network(*inputs(1, beyond))
    with pytest.raises(ValueError, match=f"{beyond} frames exceed the 16 learnt positions"):
        network.new_state(1, beyond, jnp.float32)
    unbounded = make(replace(CONFIG, use_learnable_pos_emb=False))
    assert unbounded.new_state(1, beyond, jnp.float32).cache.key_mask.shape == (1, beyond)


def test_padding_beyond_the_last_position_changes_no_score(plain) -> None:
    limit = CONFIG.max_length_causal_mask
    hidden, codes = inputs(2, limit)
    whole = scores(*plain, hidden, codes)
    more, more_codes, mask = padded(hidden, codes, 5)
    within = scores(*plain, more, more_codes, mask=mask)
    np.testing.assert_allclose(within[:, :limit], whole, atol=ATOL)


def test_a_decoder_that_is_not_causal_has_no_step() -> None:
    with pytest.raises(ValueError, match="is_causal"):
        make(replace(CONFIG, is_causal=False)).new_state(1, 4, jnp.float32)


def test_every_variable_is_sharded_somewhere() -> None:
    config = replace(CONFIG, has_xattn=True, xa_d_memory=6, xa_n_heads=2)
    for path, info in describe(make(config)).items():
        is_stacked = path.startswith(("transformer.layers.", "code_embeddings."))
        assert info.is_stacked == is_stacked, path
        assert len(info.axes) == len(info.shape), path
        if len(info.shape) - is_stacked > 1:
            assert "embed" in info.axes, path
