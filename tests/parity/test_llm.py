"""The decoder against transformers: hidden states, logits, loss, gradients, greedy decoding."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.mapping import Table
from speechlm2_jax.conversion.readers import open_weights
from speechlm2_jax.generation.salm import DecodingConfig, generate_tokens
from speechlm2_jax.layers.attention import AttentionMask
from speechlm2_jax.layers.module import Variables, abstract, describe, merge, split
from speechlm2_jax.layers.scores import capped
from speechlm2_jax.llm.decoder import Decoder

DATA = Path(__file__).parents[1] / "data" / "llm"
FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "nemotron")
ATOL = 1e-4  # activations of a whole model in fp32; see the goldens' README
LOSS_RTOL = 1e-5
GRADIENT_RTOL = 1e-4
NEW_TOKENS = 16


@cache
def load(family: str) -> tuple[Any, Variables, Table]:
    config = decoder_config(read_json(family, "config.json"))
    network = abstract(lambda rngs: Decoder(config, rngs=rngs))
    table = decoder_table(config)
    variables = mapping.load(open_weights(DATA / family), table, describe(network))
    return split(network)[0], jax.tree.map(jnp.asarray, variables), table


def read_json(family: str, name: str) -> dict[str, Any]:
    return json.loads((DATA / family / name).read_text())


@cache
def goldens(family: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return (
        load_file(DATA / family / "golden.safetensors"),
        read_json(family, "golden.json"),
    )


def to_right_padding(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Moves the padding of every row from its left to its right."""
    shifts = mask.argmax(axis=1)
    return np.stack([np.roll(row, -s, axis=0) for row, s in zip(x, shifts, strict=True)])


def placed(ids: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return {
        "positions": jnp.asarray(positions, jnp.int32),
        "segments": jnp.ones(ids.shape, jnp.int32),
        "attention_mask": jnp.asarray(mask, bool),
    }


@partial(jax.jit, static_argnames="graphdef")
def run(
    graphdef: Any, variables: Variables, ids: jax.Array, place: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """What transformers calls hidden_states ([L + 1, B, T, D], the last one normed), and logits."""
    decoder: Decoder = merge(graphdef, variables)
    embeds = decoder.embed(ids)
    layers = decoder.layer_outputs(embeds, **place)
    last = decoder(embeds, **place)
    return jnp.concatenate([embeds[None], layers[:-1], last[None]]), decoder.logits(last)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_equal_the_original(family: str, padding: str) -> None:
    golden, _ = goldens(family)
    ids, mask = golden["input_ids"], golden["attention_mask"].astype(bool)
    expected = np.stack([golden[f"forward/hidden_{i}"] for i in range(3)])
    turn = (lambda x: to_right_padding(x, mask)) if padding == "right" else (lambda x: x)
    place = placed(turn(ids), turn(mask))
    states, logits = map(np.asarray, run(*load(family)[:2], turn(ids), place))
    for ours, theirs in zip(states, expected, strict=True):
        np.testing.assert_allclose(ours[turn(mask)], turn(theirs)[turn(mask)], atol=ATOL, rtol=0)
    theirs = np.zeros_like(logits)
    theirs[:, -10:] = golden["forward/logits_last10"]
    scored = mask & (np.arange(ids.shape[1]) >= ids.shape[1] - 10)
    np.testing.assert_allclose(logits[turn(scored)], turn(theirs)[turn(scored)], atol=ATOL, rtol=0)


def attend_like_the_original(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Adds the mask instead of selecting: only gradients of queries without any key differ."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    bias = jnp.where(mask.dense(), 0.0, jnp.finfo(jnp.float32).min)[:, None]
    scores = capped(jnp.einsum("btnh,bsnh->bnts", q, k) * scale, softcap)
    weights = jax.nn.softmax(scores + bias, axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_original(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These goldens score a row's first token from the padding before it, a step without keys.
    monkeypatch.setattr("speechlm2_jax.llm.attention.attend", attend_like_the_original)
    golden, facts = goldens(family)
    ids, mask = golden["input_ids"], golden["attention_mask"].astype(bool)
    graphdef, variables, table = load(family)

    def loss(variables: Variables) -> jax.Array:
        decoder: Decoder = merge(graphdef, variables)
        hidden = decoder(decoder.embed(jnp.asarray(ids)), **placed(ids, mask))
        scores = jax.nn.log_softmax(decoder.logits(hidden)[:, :-1])
        picked = jnp.take_along_axis(scores, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * mask[:, 1:]) / mask[:, 1:].sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables)
    np.testing.assert_allclose(value, facts["loss"], rtol=LOSS_RTOL)
    padding = read_json(family, "config.json")["pad_token_id"]
    if padding is not None:  # torch gives the padding row of an embedding no gradient
        gradients["embedding.weight"] = gradients["embedding.weight"].at[padding].set(0.0)
    norms = {name: np.linalg.norm(g) for name, g in mapping.export(gradients, table).items()}
    assert set(norms) == set(facts["grad_norms"])
    for name, expected in facts["grad_norms"].items():
        np.testing.assert_allclose(norms[name], expected, rtol=GRADIENT_RTOL, err_msg=name)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def generate(
    graphdef: Any, variables: Variables, ids: jax.Array, mask: jax.Array, config: DecodingConfig
) -> jax.Array:
    decoder: Decoder = merge(graphdef, variables)
    lengths = ids.shape[1] - jnp.argmax(mask[:, ::-1], axis=1)
    return generate_tokens(
        decoder,
        decoder.embed(ids),
        lengths=lengths.astype(jnp.int32),
        attention_mask=mask,
        config=config,
    )


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_original(family: str, padding: str) -> None:
    golden, facts = goldens(family)
    ids, mask = golden["input_ids"], golden["attention_mask"].astype(bool)
    if padding == "right":
        ids, mask = to_right_padding(ids, mask), to_right_padding(mask, mask)
    stop = read_json(family, "config.json")["eos_token_id"]
    decoding = DecodingConfig(
        max_new_tokens=NEW_TOKENS, stop_ids=(stop,), pad_id=facts["pad_id_used"]
    )
    ours = np.asarray(generate(*load(family)[:2], ids, mask, decoding))
    for theirs in (
        golden["generate/sequences"][:, ids.shape[1] :],
        golden["generate_inputs_embeds/new_tokens"],
    ):
        steps = theirs.shape[1]  # the original stops when all rows have
        np.testing.assert_array_equal(ours[:, :steps], theirs)
        np.testing.assert_array_equal(ours[:, steps:], decoding.pad_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_each_cached_step_equal_the_original(family: str) -> None:
    golden, _ = goldens(family)
    ids, mask = golden["generate/sequences"], golden["attention_mask"].astype(bool)
    prompt = mask.shape[1]
    graphdef, variables, _ = load(family)
    decoder: Decoder = merge(graphdef, variables)
    extend = jax.jit(
        lambda variables, *args, **place: merge(graphdef, variables).extend(*args, **place)
    )
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    np.testing.assert_array_equal(positions, golden["generate/position_ids_prefill"])
    step = extend(
        variables,
        decoder.embed(jnp.asarray(ids[:, :prompt])),
        decoder.new_cache(2, prompt + 3, jnp.float32),
        positions=jnp.asarray(positions, jnp.int32),
        attention_mask=jnp.asarray(mask),
    )
    for i in range(4):
        scores = decoder.logits(step.hidden[:, -1:])[:, 0]
        expected = golden["generate/step_logits_first4"][:, i]
        np.testing.assert_allclose(scores, expected, atol=ATOL, rtol=0)
        if i < 3:
            step = extend(
                variables,
                decoder.embed(jnp.asarray(ids[:, prompt + i : prompt + i + 1])),
                step.cache,
                positions=jnp.asarray(positions[:, -1:] + 1 + i, jnp.int32),
                attention_mask=jnp.ones((2, 1), bool),
            )
