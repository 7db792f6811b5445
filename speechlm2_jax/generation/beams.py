"""Beam search over flattened rows [B * K], as Hugging Face's generate does it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.decoding import (
    BeamConfig,
    CachedDecoder,
    DecodingConfig,
    Prompts,
    Rows,
    process_scores,
    run_prompts,
    run_token,
    step_rngs,
)
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.cpu import read_in_place

NOWHERE = -1e9
"""The score of a place that holds no answer, as in transformers."""


class FinishedBeams(NamedTuple):
    """The best finished answers of each row so far, the best first."""

    ids: Int[Array, "B K A"]
    lengths: Int[Array, "B K"]
    """0 where a place is free."""
    scores: Float[Array, "B K"]


class BeamSearchState(NamedTuple):
    """State of the loop that follows K paths per row."""

    step: Int[Array, ""]
    ids: Int[Array, "B K H"]
    scores: Float[Array, "B K"]
    """Log-probabilities of the open paths, the likeliest first."""
    found: FinishedBeams
    finished: Bool[Array, " B"]
    cache: KVCache
    """Of B * K rows."""
    rows: Rows
    rngs: Key[Array, " B"] | None


class _Candidates(NamedTuple):
    """The likeliest continuations of a row's paths, the likeliest first; C >= 2 K of them."""

    scores: Float[Array, "B C"]
    source: Int[Array, "B C"]
    """Which path each goes on with."""
    ids: Int[Array, "B C H"]
    is_end: Bool[Array, "B C"]


def prefill(
    decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig, search: BeamConfig
) -> BeamSearchState:
    """Runs the prompts and spreads the first tokens over the paths."""
    prompt = run_prompts(decoder, prompts, config)
    batch, width = len(prompts.lengths), search.count
    only_first = jnp.asarray([0.0] + [NOWHERE] * (width - 1), jnp.float32)[None]
    start = BeamSearchState(
        step=jnp.zeros((), jnp.int32),
        ids=prompt.ids.reshape(batch, width, -1),
        scores=jnp.broadcast_to(only_first, (batch, width)),
        found=FinishedBeams(
            ids=jnp.full((batch, width, config.max_new_tokens), config.pad_id, jnp.int32),
            lengths=jnp.zeros((batch, width), jnp.int32),
            scores=jnp.full((batch, width), NOWHERE, jnp.float32),
        ),
        finished=prompts.lengths == 0,
        cache=prompt.cache,
        rows=prompt.rows,
        rngs=prompts.rngs,
    )
    return _spread(decoder, start, prompt.hidden, config, search)


def decode(
    decoder: CachedDecoder,
    state: BeamSearchState,
    config: DecodingConfig,
    search: BeamConfig,
    until: Int[Array, ""] | int,
) -> BeamSearchState:
    """Follows the paths until they have `until` tokens or no row can do better."""
    dtype = state.cache.keys.dtype
    before = state.ids.shape[2] - config.max_new_tokens

    def is_unfinished(state: BeamSearchState) -> Array:
        return (state.step < until) & ~jnp.all(state.finished)

    def advance(state: BeamSearchState) -> BeamSearchState:
        token = jax.lax.dynamic_slice_in_dim(state.ids, before + state.step - 1, 1, axis=2)
        attention_mask = jnp.repeat(~state.finished, search.count)
        place = state.rows.place + state.step - 1
        hidden, cache = run_token(
            decoder, state.cache, token.reshape(-1), place, attention_mask, dtype
        )
        return _spread(decoder, state._replace(cache=cache), hidden, config, search)

    with read_in_place(decoder):
        return jax.lax.while_loop(is_unfinished, advance, state)


def best(
    state: BeamSearchState, config: DecodingConfig, search: BeamConfig
) -> tuple[Int[Array, "R A"], Int[Array, " R"], Float[Array, " R"], Bool[Array, " R"]]:
    """The best answers of each row: those found and, where the search is not over, the open paths.

    Gives ids, lengths, scores, and of which rows the search is over.
    """
    step = state.step
    length = jnp.where(state.finished[:, None], 0, step)
    open_paths = FinishedBeams(
        ids=state.ids[:, :, -config.max_new_tokens :],
        lengths=jnp.broadcast_to(length, state.scores.shape),
        scores=jnp.where(state.finished[:, None], NOWHERE, _by_length(state.scores, step, search)),
    )
    found = _best_of(state.found, open_paths)
    ids, lengths, scores = jax.tree.map(
        lambda x: x[:, : config.answers].reshape(-1, *x.shape[2:]), found
    )
    is_said = jnp.arange(ids.shape[1])[None] < lengths[:, None]
    ended = jnp.repeat(state.finished, config.answers)
    return jnp.where(is_said, ids, config.pad_id), lengths, scores, ended


def _spread(
    decoder: CachedDecoder,
    state: BeamSearchState,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
    search: BeamConfig,
) -> BeamSearchState:
    """Chooses the next token of every path: some end, the likeliest others go on."""
    candidates = _candidates(decoder, state, hidden, config, search)
    found = _collected(state, candidates, config, search)
    going_on = jnp.where(candidates.is_end, candidates.scores + NOWHERE, candidates.scores)
    scores, chosen = jax.lax.top_k(going_on, search.count)
    source = jnp.take_along_axis(candidates.source, chosen, axis=1)
    step = state.step + 1
    worst = jnp.where(jnp.all(found.lengths > 0, axis=1), found.scores[:, -1], NOWHERE)
    farthest = step
    if search.early_stopping == "never":
        limit = state.rows.limit[:: search.count]
        farthest = jnp.where(jnp.asarray(search.length_penalty) > 0, limit, step)
    over = ~(_by_length(scores[:, :1], farthest, search)[:, 0] > worst)
    over |= jnp.all(candidates.is_end, axis=1)
    if search.early_stopping is True:
        over |= jnp.all(found.lengths > 0, axis=1)
    recent = state.cache.key_mask.shape[1] - config.max_new_tokens + 1
    return state._replace(
        step=step,
        ids=jnp.take_along_axis(candidates.ids, chosen[:, :, None], axis=1),
        scores=scores,
        found=found,
        finished=state.finished | over,
        cache=state.cache.reordered(source, since=recent),
    )


def _candidates(
    decoder: CachedDecoder,
    state: BeamSearchState,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
    search: BeamConfig,
) -> _Candidates:
    batch, width, _ = state.ids.shape
    flat_ids = state.ids.reshape(batch * width, -1)
    scores = jax.nn.log_softmax(decoder.logits(hidden)[:, 0].astype(jnp.float32), axis=-1)
    scores = process_scores(scores, flat_ids, state.step, state.rows, config)
    vocabulary = scores.shape[-1]
    scores = (scores.reshape(batch, width, vocabulary) + state.scores[:, :, None]).reshape(
        batch, -1
    )
    # so many that K do not end, whatever the ends among them
    count = min(max(2, 1 + len(config.stop_ids)) * width, width * vocabulary)
    top, index = _top(scores, count, state, config)
    token = (index % vocabulary).astype(jnp.int32)
    ids = jnp.take_along_axis(state.ids, (index // vocabulary)[:, :, None], axis=1)
    position = state.ids.shape[2] - config.max_new_tokens + state.step
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    is_last = state.step + 1 >= state.rows.limit[::width]
    return _Candidates(
        scores=top,
        source=index // vocabulary,
        ids=jax.lax.dynamic_update_slice_in_dim(ids, token[:, :, None], position, axis=2),
        is_end=stops | is_last[:, None],
    )


def _top(
    scores: Float[Array, "B N"], count: int, state: BeamSearchState, config: DecodingConfig
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """The likeliest, or as many drawn without replacement; the likeliest first."""
    if not config.do_sample:
        values, index = jax.lax.top_k(scores, count)
        return values, index
    # the largest of scores with Gumbel noise are a draw without replacement (Kool et al. 2019)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(
        step_rngs(state.rngs, state.step)
    )
    _, drawn = jax.lax.top_k(scores + noise, count)
    values, order = jax.lax.top_k(jnp.take_along_axis(scores, drawn, axis=1), count)
    return values, jnp.take_along_axis(drawn, order, axis=1)


def _collected(
    state: BeamSearchState, candidates: _Candidates, config: DecodingConfig, search: BeamConfig
) -> FinishedBeams:
    """Adds the ends among a row's K likeliest continuations to its finished answers."""
    is_new = candidates.is_end & (jnp.arange(candidates.is_end.shape[1]) < search.count)[None]
    is_new &= ~state.finished[:, None]
    length = state.step + 1
    ends = FinishedBeams(
        ids=candidates.ids[:, :, -config.max_new_tokens :],
        lengths=jnp.where(is_new, length, 0),
        scores=jnp.where(is_new, _by_length(candidates.scores, length, search), NOWHERE),
    )
    return _best_of(state.found, ends)


def _best_of(one: FinishedBeams, other: FinishedBeams) -> FinishedBeams:
    """The K best of both, K being the places of the first."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), one, other)
    scores, index = jax.lax.top_k(both.scores, one.scores.shape[1])
    return FinishedBeams(
        ids=jnp.take_along_axis(both.ids, index[:, :, None], axis=1),
        lengths=jnp.take_along_axis(both.lengths, index, axis=1),
        scores=scores,
    )


def _by_length(scores: Float[Array, "B N"], length: Any, search: BeamConfig) -> Array:
    """Divides by the length to the power of the length penalty."""
    power = jnp.power(jnp.asarray(length, jnp.float32), search.length_penalty)
    return scores / (power[:, None] if power.ndim else power)
