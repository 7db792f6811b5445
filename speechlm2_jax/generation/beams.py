"""Beam search as in Hugging Face's `generate`: all beams of all prompts are one batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.decoding import (
    BeamConfig,
    CachedDecoder,
    DecodingConfig,
    PromptInfo,
    Prompts,
    process_scores,
    run_prompts,
    run_token,
    token_rngs,
)
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.unstacked import read_in_place

NO_SCORE = -1e9
"""Score of a hypothesis or beam that does not exist, as in transformers."""


class BeamHypotheses(NamedTuple):
    """The best finished hypotheses of each prompt, best first."""

    ids: Int[Array, "B beams A"]
    lengths: Int[Array, "B beams"]
    """0: no hypothesis yet."""
    scores: Float[Array, "B beams"]


class BeamSearchState(NamedTuple):
    """State of the loop that extends the beams of each prompt."""

    generated: Int[Array, ""]
    """Number of tokens generated so far."""
    ids: Int[Array, "B beams P"]
    """Prompt ids, then generated ids."""
    scores: Float[Array, "B beams"]
    """Log-probabilities of the open beams, highest first."""
    hypotheses: BeamHypotheses
    finished: Bool[Array, " B"]
    """True where the search of a prompt has ended."""
    cache: KVCache
    """KV cache of B * beams sequences."""
    info: PromptInfo
    rngs: Key[Array, " B"] | None


class _Candidates(NamedTuple):
    """The C most likely extensions of the beams of each prompt, most likely first."""

    scores: Float[Array, "B C"]
    source: Int[Array, "B C"]
    """Index of the extended beam."""
    ids: Int[Array, "B C P"]
    is_end: Bool[Array, "B C"]
    """True if the new token ends the hypothesis."""


def prefill(
    decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig, search: BeamConfig
) -> BeamSearchState:
    """Runs the prompts and starts each beam with a first token."""
    prompt = run_prompts(decoder, prompts, config)
    batch, beams = len(prompts.lengths), search.count
    only_first = jnp.asarray([0.0] + [NO_SCORE] * (beams - 1), jnp.float32)[None]
    start = BeamSearchState(
        generated=jnp.zeros((), jnp.int32),
        ids=prompt.ids.reshape(batch, beams, -1),
        scores=jnp.broadcast_to(only_first, (batch, beams)),
        hypotheses=BeamHypotheses(
            ids=jnp.full((batch, beams, config.max_new_tokens), config.pad_id, jnp.int32),
            lengths=jnp.zeros((batch, beams), jnp.int32),
            scores=jnp.full((batch, beams), NO_SCORE, jnp.float32),
        ),
        finished=prompts.lengths == 0,
        cache=prompt.cache,
        info=prompt.info,
        rngs=prompts.rngs,
    )
    return _extend_beams(decoder, start, prompt.hidden, config, search)


def decode(
    decoder: CachedDecoder,
    state: BeamSearchState,
    config: DecodingConfig,
    search: BeamConfig,
    until: Int[Array, ""] | int,
) -> BeamSearchState:
    """Extends the beams to `until` tokens, or until the search of every prompt has ended."""
    dtype = state.cache.dtype
    prompt_length = state.ids.shape[2] - config.max_new_tokens

    def is_unfinished(state: BeamSearchState) -> Array:
        return (state.generated < until) & ~jnp.all(state.finished)

    def advance(state: BeamSearchState) -> BeamSearchState:
        latest = prompt_length + state.generated - 1
        token = jax.lax.dynamic_slice_in_dim(state.ids, latest, 1, axis=2)
        attention_mask = jnp.repeat(~state.finished, search.count)
        position = state.info.position + state.generated - 1
        hidden, cache = run_token(
            decoder, state.cache, token.reshape(-1), position, attention_mask, dtype
        )
        return _extend_beams(decoder, state._replace(cache=cache), hidden, config, search)

    decoder = read_in_place(decoder)
    return jax.lax.while_loop(is_unfinished, advance, state)


def best(
    state: BeamSearchState, config: DecodingConfig, search: BeamConfig
) -> tuple[Int[Array, "R A"], Int[Array, " R"], Float[Array, " R"], Bool[Array, " R"]]:
    """Returns the ids, lengths and scores of the best hypotheses, and True where the search ended.

    Where the search has not ended, open beams count as hypotheses.
    """
    generated = state.generated
    length = jnp.where(state.finished[:, None], 0, generated)
    open_beams = BeamHypotheses(
        ids=state.ids[:, :, -config.max_new_tokens :],
        lengths=jnp.broadcast_to(length, state.scores.shape),
        scores=jnp.where(
            state.finished[:, None], NO_SCORE, _normalized(state.scores, generated, search)
        ),
    )
    hypotheses = _merge_best(state.hypotheses, open_beams)
    ids, lengths, scores = jax.tree.map(
        lambda x: x[:, : config.return_sequences].reshape(-1, *x.shape[2:]), hypotheses
    )
    is_real = jnp.arange(ids.shape[1])[None] < lengths[:, None]
    ended = jnp.repeat(state.finished, config.return_sequences)
    return jnp.where(is_real, ids, config.pad_id), lengths, scores, ended


def _extend_beams(
    decoder: CachedDecoder,
    state: BeamSearchState,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
    search: BeamConfig,
) -> BeamSearchState:
    """Adds one token to every beam: finished hypotheses are stored, the best others stay open."""
    candidates = _candidates(decoder, state, hidden, config, search)
    hypotheses = _add_finished(state, candidates, config, search)
    open_scores = jnp.where(candidates.is_end, candidates.scores + NO_SCORE, candidates.scores)
    scores, chosen = jax.lax.top_k(open_scores, search.count)
    source = jnp.take_along_axis(candidates.source, chosen, axis=1)
    generated = state.generated + 1
    worst = jnp.where(jnp.all(hypotheses.lengths > 0, axis=1), hypotheses.scores[:, -1], NO_SCORE)
    longest = generated
    if search.early_stopping == "never":
        limit = state.info.limit[:: search.count]
        longest = jnp.where(jnp.asarray(search.length_penalty) > 0, limit, generated)
    has_ended = ~(_normalized(scores[:, :1], longest, search)[:, 0] > worst)
    has_ended |= jnp.all(candidates.is_end, axis=1)
    if search.early_stopping is True:
        has_ended |= jnp.all(hypotheses.lengths > 0, axis=1)
    recent = state.cache.key_mask.shape[1] - config.max_new_tokens + 1
    return state._replace(
        generated=generated,
        ids=jnp.take_along_axis(candidates.ids, chosen[:, :, None], axis=1),
        scores=scores,
        hypotheses=hypotheses,
        finished=state.finished | has_ended,
        cache=state.cache.reordered(source, since=recent),
    )


def _candidates(
    decoder: CachedDecoder,
    state: BeamSearchState,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
    search: BeamConfig,
) -> _Candidates:
    batch, beams, _ = state.ids.shape
    flat_ids = state.ids.reshape(batch * beams, -1)
    scores = jax.nn.log_softmax(decoder.logits(hidden)[:, 0].astype(jnp.float32), axis=-1)
    scores = process_scores(scores, flat_ids, state.generated, state.info, config)
    vocabulary = scores.shape[-1]
    scores = (scores.reshape(batch, beams, vocabulary) + state.scores[:, :, None]).reshape(
        batch, -1
    )
    # enough that `beams` of them do not end, however many end tokens are among them
    count = min(max(2, 1 + len(config.stop_ids)) * beams, beams * vocabulary)
    top, index = _top(scores, count, state, config)
    token = (index % vocabulary).astype(jnp.int32)
    ids = jnp.take_along_axis(state.ids, (index // vocabulary)[:, :, None], axis=1)
    end = state.ids.shape[2] - config.max_new_tokens + state.generated
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    is_last = state.generated + 1 >= state.info.limit[::beams]
    return _Candidates(
        scores=top,
        source=index // vocabulary,
        ids=jax.lax.dynamic_update_slice_in_dim(ids, token[:, :, None], end, axis=2),
        is_end=stops | is_last[:, None],
    )


def _top(
    scores: Float[Array, "B all"], count: int, state: BeamSearchState, config: DecodingConfig
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """The `count` highest scores, or a sample of `count` without replacement; highest first."""
    if not config.do_sample:
        values, index = jax.lax.top_k(scores, count)
        return values, index
    # the top k of scores plus Gumbel noise sample without replacement (Kool et al. 2019)
    noise = jax.vmap(lambda rng: jax.random.gumbel(rng, scores.shape[1:]))(
        token_rngs(state.rngs, state.generated)
    )
    _, drawn = jax.lax.top_k(scores + noise, count)
    values, order = jax.lax.top_k(jnp.take_along_axis(scores, drawn, axis=1), count)
    return values, jnp.take_along_axis(drawn, order, axis=1)


def _add_finished(
    state: BeamSearchState, candidates: _Candidates, config: DecodingConfig, search: BeamConfig
) -> BeamHypotheses:
    """Adds the finished hypotheses among the best `beams` candidates of each prompt."""
    is_new = candidates.is_end & (jnp.arange(candidates.is_end.shape[1]) < search.count)[None]
    is_new &= ~state.finished[:, None]
    length = state.generated + 1
    finished = BeamHypotheses(
        ids=candidates.ids[:, :, -config.max_new_tokens :],
        lengths=jnp.where(is_new, length, 0),
        scores=jnp.where(is_new, _normalized(candidates.scores, length, search), NO_SCORE),
    )
    return _merge_best(state.hypotheses, finished)


def _merge_best(one: BeamHypotheses, other: BeamHypotheses) -> BeamHypotheses:
    """The best hypotheses of both; as many as `one` holds."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), one, other)
    scores, index = jax.lax.top_k(both.scores, one.scores.shape[1])
    return BeamHypotheses(
        ids=jnp.take_along_axis(both.ids, index[:, :, None], axis=1),
        lengths=jnp.take_along_axis(both.lengths, index, axis=1),
        scores=scores,
    )


def _normalized(
    scores: Float[Array, "B C"], length: Int[Array, "*shape"] | int, search: BeamConfig
) -> Array:
    """Divides by length ** length_penalty."""
    power = jnp.power(jnp.asarray(length, jnp.float32), search.length_penalty)
    return scores / (power[:, None] if power.ndim else power)
