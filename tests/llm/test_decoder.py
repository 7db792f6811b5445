"""Invariants of the decoder: padding, packing, caching, adapters, dtypes."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers.lora import TARGET_NAMES, LoraConfig, merge_lora
from speechlm2_jax.layers.module import Variables, describe, merge, split
from speechlm2_jax.layers.rope import LinearScaling, RopeConfig
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder

ATOL = 1e-5  # values are O(1); sums of other lengths round otherwise
GRADIENT_ATOL = 1e-5
CONFIG = DecoderConfig(
    vocab_size=29,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=6,
    mlp_width=20,
    qk_norm="head",
    attention_bias=True,
    init_std=0.3,
    rope=RopeConfig(theta=1000.0, scaling=LinearScaling(factor=2.0)),
)
LORA = LoraConfig(r=3, lora_alpha=6, target_modules=tuple(TARGET_NAMES))
DEFINITION, VARIABLES = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
ADAPTED_DEFINITION, FRESH = split(Decoder(CONFIG, rngs=nnx.Rngs(0), lora=LORA))
ADAPTED = {
    path: jax.random.normal(jax.random.key(i), v.shape) * 0.3 if path.endswith("lora_b") else v
    for i, (path, v) in enumerate(FRESH.items())
}
STEPS = 7


@partial(jax.jit, static_argnames="graphdef")
def hidden(graphdef: Any, variables: Variables, embeds: jax.Array, **place: Any) -> jax.Array:
    return merge(graphdef, variables)(embeds, **place)


def embeds(rows: int = 1, steps: int = STEPS, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, steps, CONFIG.width))


def place(rows: int = 1, steps: int = STEPS) -> dict[str, jax.Array]:
    return {
        "positions": jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32), (rows, steps)),
        "segments": jnp.ones((rows, steps), jnp.int32),
        "attention_mask": jnp.ones((rows, steps), bool),
    }


def padded(before: int, after: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One row of STEPS real steps between garbage; positions count from the row's start."""
    total = before + STEPS + after
    inside = jnp.arange(total)[None, :] - before
    attention_mask = (inside >= 0) & (inside < STEPS)
    row = jnp.where(attention_mask[..., None], 0.0, 50.0 * embeds(1, total, seed=9))
    row = row.at[:, before : before + STEPS].set(embeds())
    where = {"positions": jnp.arange(total)[None], "segments": attention_mask.astype(jnp.int32)}
    return row, where | {"attention_mask": attention_mask}


@pytest.mark.parametrize(("before", "after"), [(0, 3), (4, 0)])
def test_padding_changes_no_hidden_state(before: int, after: int) -> None:
    alone = hidden(DEFINITION, VARIABLES, embeds(), **place())
    row, where = padded(before, after)
    within = hidden(DEFINITION, VARIABLES, row, **where)[:, before : before + STEPS]
    np.testing.assert_allclose(within, alone, atol=ATOL)


def test_neither_padding_nor_rematerialisation_changes_a_gradient() -> None:
    def loss(
        variables: Variables, row: jax.Array, where: dict[str, jax.Array], remat: str
    ) -> jax.Array:
        decoder: Decoder = merge(DEFINITION, variables)
        scores = jax.nn.log_softmax(decoder.logits(decoder(row, **where, remat=remat)))
        return jnp.sum(jnp.where(where["attention_mask"], scores[..., 3], 0.0)) / STEPS

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
    alone, alone_row = gradient(VARIABLES, embeds(), place(), "none")
    for remat in ("full", "dots"):
        within, within_row = gradient(VARIABLES, *padded(4, 3), remat)
        for path, expected in alone.items():
            np.testing.assert_allclose(within[path], expected, atol=GRADIENT_ATOL, err_msg=path)
        np.testing.assert_allclose(within_row[:, 4 : 4 + STEPS], alone_row, atol=GRADIENT_ATOL)


def test_neighbours_change_no_hidden_state() -> None:
    rows = embeds(3)
    together = hidden(DEFINITION, VARIABLES, rows, **place(3))
    for i in range(3):
        alone = hidden(DEFINITION, VARIABLES, rows[i : i + 1], **place())
        np.testing.assert_allclose(together[i : i + 1], alone, atol=ATOL)


def test_later_steps_and_steps_that_are_no_keys_have_no_influence() -> None:
    attention_mask = jnp.asarray([[True, True, False, True, True, True, True]])
    before = hidden(DEFINITION, VARIABLES, embeds(), **place() | {"attention_mask": attention_mask})
    changed = embeds().at[0, 2].add(9.0).at[0, 5].add(9.0)
    after = hidden(DEFINITION, VARIABLES, changed, **place() | {"attention_mask": attention_mask})
    kept = np.asarray([0, 1, 3, 4])
    np.testing.assert_allclose(after[:, kept], before[:, kept], atol=ATOL)
    assert not np.allclose(after[:, 5:], before[:, 5:], atol=0.1)


def test_packed_conversations_equal_each_alone() -> None:
    packed = hidden(
        DEFINITION,
        VARIABLES,
        embeds(),
        positions=jnp.asarray([[0, 1, 2, 0, 1, 2, 3]]),
        segments=jnp.asarray([[1, 1, 1, 2, 2, 2, 2]]),
        attention_mask=jnp.ones((1, STEPS), bool),
    )
    for part in (slice(0, 3), slice(3, 7)):
        row = embeds()[:, part]
        alone = hidden(DEFINITION, VARIABLES, row, **place(1, row.shape[1]))
        np.testing.assert_allclose(packed[:, part], alone, atol=ATOL)


@pytest.mark.parametrize("parts", [(4, 1, 1, 1), (2, 3, 2)])
def test_cached_steps_equal_the_whole(parts: tuple[int, ...]) -> None:
    where = place(2) | {"attention_mask": place(2)["attention_mask"].at[0, 1].set(False)}
    whole = hidden(DEFINITION, VARIABLES, embeds(2), **where)
    decoder: Decoder = merge(DEFINITION, VARIABLES)
    cache, start, outputs = decoder.new_cache(2, STEPS + 2, jnp.float32), 0, []
    extend = jax.jit(decoder.extend)
    for steps in parts:
        part = slice(start, start + steps)
        out, cache = extend(
            embeds(2)[:, part],
            cache,
            positions=where["positions"][:, part],
            attention_mask=where["attention_mask"][:, part],
        )
        outputs.append(out)
        start += steps
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=ATOL)


def test_fresh_adapters_change_nothing() -> None:
    shared = {path: FRESH[path] for path in VARIABLES}
    base = hidden(DEFINITION, shared, embeds(), **place())
    fresh = hidden(ADAPTED_DEFINITION, FRESH, embeds(), **place())
    np.testing.assert_allclose(fresh, base, atol=ATOL)


def test_merged_adapters_equal_adapters() -> None:
    adapted = hidden(ADAPTED_DEFINITION, ADAPTED, embeds(), **place())
    merged = merge_lora(ADAPTED, LORA)
    assert set(merged) == set(VARIABLES)
    plain = hidden(DEFINITION, merged, embeds(), **place())
    np.testing.assert_allclose(plain, adapted, atol=ATOL)
    assert not np.allclose(plain, hidden(DEFINITION, VARIABLES, embeds(), **place()), atol=0.1)


def test_lora_dropout_of_a_row_depends_on_its_key_only() -> None:
    lora = replace(LORA, lora_dropout=0.4, target_modules=("v_proj",))
    graphdef, variables = split(Decoder(CONFIG, rngs=nnx.Rngs(0), lora=lora))
    variables = {path: ADAPTED[path] for path in variables}
    rngs = jax.random.split(jax.random.key(5), 2)
    row, where = padded(0, 3)
    rows = jnp.concatenate([row + 1.0, row])
    where = {name: jnp.concatenate([x, x]) for name, x in where.items()}
    among_others = hidden(graphdef, variables, rows, **where, rngs=rngs)[1:, :STEPS]
    alone = hidden(graphdef, variables, embeds(), **place(), rngs=rngs[1:])
    np.testing.assert_allclose(among_others, alone, atol=ATOL)
    off = hidden(graphdef, variables, embeds(), **place())
    assert not np.allclose(alone, off, atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_without_any_key_are_finite_with_finite_gradients(dtype: str) -> None:
    nothing = place(2) | {"attention_mask": jnp.zeros((2, STEPS), bool)}

    def total(variables: Variables) -> jax.Array:
        decoder: Decoder = merge(DEFINITION, variables)
        logits = decoder.logits(decoder(embeds(2).astype(dtype), **nothing))
        return jnp.mean(jnp.square(logits))

    value, gradients = jax.jit(jax.value_and_grad(total))(VARIABLES)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_no_dtype_is_promoted_silently() -> None:
    def forward(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        decoder: Decoder = merge(ADAPTED_DEFINITION, ADAPTED)
        out = decoder(row, **place(), rngs=jax.random.split(jax.random.key(0), 1))
        return out, decoder.logits(out)

    with jax.numpy_dtype_promotion("strict"):
        for dtype in ("float32", "bfloat16"):
            out, logits = jax.eval_shape(forward, embeds().astype(dtype))
            assert (out.dtype, logits.dtype) == (dtype, jnp.float32)


def test_a_tied_decoder_scores_with_its_embedding_table() -> None:
    tied = Decoder(replace(CONFIG, tied=True), rngs=nnx.Rngs(0))
    assert "head.weight" not in describe(tied)
    out = embeds()
    expected = out @ tied.embedding.weight[...].T
    np.testing.assert_allclose(tied.logits(out), expected, atol=ATOL)


def test_every_variable_of_a_stack_has_a_layer_axis_and_is_sharded_somewhere() -> None:
    for path, info in describe(Decoder(CONFIG, rngs=nnx.Rngs(0), lora=LORA)).items():
        assert info.is_stacked == path.startswith("layers."), path
        assert len(info.axes) == len(info.shape), path
        if path.endswith(".weight") and "norm" not in path:
            assert "embed" in info.axes, path


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"head_width": 5}, "head_width=5"),
        ({"activation": "softplus"}, "'softplus'"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(CONFIG, **wrong)
