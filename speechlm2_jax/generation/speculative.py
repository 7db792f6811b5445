"""Exact speculative decoding: one pass of the LLM checks several draft tokens.

A pass runs the latest token and K draft tokens. At each position a token is chosen as without
drafts: the most likely one, or one drawn with the random key of its number. A draft token is
accepted if it is the token chosen in its place and all before it are. The first token chosen
otherwise is kept too, so every pass adds at least one token. Hence the responses are those of
`salm`, token by token, greedy or sampled. For a draft that is one certain token, this is the
rejection sampling of Leviathan et al. (2023): the token drawn in place of a rejected one has the
distribution without the rejected one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.decoding import (
    CachedDecoder,
    DecodingConfig,
    PromptInfo,
    Prompts,
    choose_token,
    copied_rngs,
    run_prompts,
)
from speechlm2_jax.generation.drafts import Drafter, Known, Proposal
from speechlm2_jax.layers.cache import DraftCache
from speechlm2_jax.layers.unstacked import read_in_place
from speechlm2_jax.sharding import constrain

PATIENCE, RETRY = 3, 4
"""When drafts are given up, and how often they are tried again (`_useful`)."""


class SpeculativeState(NamedTuple):
    """State of speculative decoding: every sequence has a length of its own."""

    ids: Int[Array, "R P"]
    """Prompt ids (if processors read them), then generated ids."""
    lengths: Int[Array, " R"]
    finished: Bool[Array, " R"]
    cache: DraftCache
    info: PromptInfo
    rngs: Key[Array, " R"] | None
    draft: Any
    """State of the drafter (a `DraftState`)."""
    drafted: Int[Array, " R"]
    """Draft tokens that were checked."""
    accepted: Int[Array, " R"]
    """Draft tokens that are part of the response."""
    misses: Int[Array, " R"]
    """Latest passes with drafts, in a row, in which none was accepted."""


def prefill(
    decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig, drafter: Drafter
) -> SpeculativeState:
    """Runs the prompts and chooses the first token of every response.

    Raises ValueError without `Prompts.drafts`, and for sampling without random keys.
    """
    if prompts.drafts is None:
        raise ValueError("speculative decoding needs a text to copy from: Prompts.drafts")
    if config.do_sample and prompts.rngs is None:
        raise ValueError("do_sample=True needs random keys: rngs, one per sequence")
    prompt = run_prompts(decoder, prompts, config)
    finished = jnp.repeat(prompts.lengths == 0, config.copies)
    source = jax.tree.map(lambda x: jnp.repeat(x, config.copies, axis=0), prompts.drafts)
    none = jnp.zeros(len(finished), jnp.int32)
    tokens = prompts.embeds.shape[1]
    state = SpeculativeState(
        ids=prompt.ids,
        lengths=none,
        finished=finished,
        cache=DraftCache.after_prompts(prompt.cache, tokens, prompt.info.position, drafter.tokens),
        info=prompt.info,
        rngs=copied_rngs(prompts.rngs, config.copies) if config.do_sample else None,
        draft=drafter.start(source, config.max_new_tokens),
        drafted=none,
        accepted=none,
        misses=none,
    )
    scores = decoder.logits(prompt.hidden)
    state = _extended(state, scores, _no_drafts(len(none)), config, drafter)
    # the first token has not been run yet: the caches end with the prompts
    return state._replace(cache=state.cache.keep(none + tokens, state.info.position))


def decode(
    decoder: CachedDecoder,
    state: SpeculativeState,
    config: DecodingConfig,
    drafter: Drafter,
    until: Int[Array, ""] | int,
) -> SpeculativeState:
    """Generates until each response has `until` tokens or more, or has ended."""

    def is_unfinished(state: SpeculativeState) -> Array:
        return jnp.any(~state.finished & (state.lengths < until))

    return decode_while(is_unfinished, decoder, state, config, drafter)


def decode_while(
    is_unfinished: Callable[[SpeculativeState], Array],
    decoder: CachedDecoder,
    state: SpeculativeState,
    config: DecodingConfig,
    drafter: Drafter,
) -> SpeculativeState:
    """Runs passes of the LLM as long as `is_unfinished`."""
    dtype = state.cache.dtype

    def advance(state: SpeculativeState) -> SpeculativeState:
        response = state.ids[:, -config.max_new_tokens :]
        known = Known(response, state.lengths, partial(_next_draft, state, config))
        draft, kept = drafter.propose(state.draft, known)
        draft = draft._replace(lengths=_useful(state, draft.lengths))
        state = state._replace(draft=kept)
        none = _no_drafts(len(draft.ids))
        # a pass over the latest tokens alone costs less, most of all on a CPU
        return jax.lax.cond(
            jnp.any(draft.lengths > 0), lambda: run(state, draft), lambda: run(state, none)
        )

    def run(state: SpeculativeState, draft: Proposal) -> SpeculativeState:
        response = state.ids[:, -config.max_new_tokens :]
        latest = jnp.maximum(state.lengths - 1, 0)[:, None]
        tokens = jnp.concatenate([jnp.take_along_axis(response, latest, axis=1), draft.ids], axis=1)
        index = jnp.arange(tokens.shape[1])[None]
        is_real = (index <= draft.lengths[:, None]) & ~state.finished[:, None]
        hidden, cache = decoder.extend(
            decoder.embed(tokens).astype(dtype),
            state.cache,
            positions=state.info.position[:, None] + latest + index,
            attention_mask=is_real,
        )
        assert isinstance(cache, DraftCache)
        state = state._replace(cache=cache)
        return _extended(state, decoder.logits(hidden), draft, config, drafter)

    decoder = read_in_place(decoder)
    return jax.lax.while_loop(is_unfinished, advance, state)


def constrained(state: SpeculativeState) -> SpeculativeState:
    """Constrains the sharding of every array, so that one program's output fits the next."""

    def by_sequence(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1)))

    without: Any = state._replace(cache=None, draft=None)
    rest = jax.tree.map(by_sequence, without)
    return rest._replace(cache=state.cache.constrained(), draft=state.draft.constrained())


def _extended(
    state: SpeculativeState,
    scores: Float[Array, "R W V"],
    draft: Proposal,
    config: DecodingConfig,
    drafter: Drafter,
) -> SpeculativeState:
    """Chooses a token after each of the W that ran, and keeps it if all drafts before are right."""
    tokens = _chosen(state, scores, draft, config)
    width = tokens.shape[1]
    index = jnp.arange(width)[None]
    is_right = (draft.ids == tokens[:, :-1]) & (index[:, 1:] <= draft.lengths[:, None])
    right = jnp.sum(jnp.cumprod(is_right, axis=1, dtype=jnp.int32), axis=1)
    stops = jnp.isin(tokens, jnp.asarray(config.stop_ids, jnp.int32))
    before_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), width)
    count = jnp.minimum(jnp.minimum(right, before_stop) + 1, state.info.limit - state.lengths)
    count = jnp.where(state.finished, 0, count).astype(jnp.int32)
    lengths = state.lengths + count
    drafted = jnp.where(state.finished, 0, draft.lengths)
    misses = jnp.where(drafted > 0, jnp.where(right > 0, 0, state.misses + 1), state.misses)
    used = state.cache.used + count
    return state._replace(
        ids=_written(state, tokens, count, config),
        lengths=lengths,
        finished=state.finished | (before_stop < count) | (lengths >= state.info.limit),
        cache=state.cache.keep(used, state.info.position + jnp.maximum(lengths - 1, 0)),
        draft=drafter.observe(state.draft, tokens, count),
        drafted=state.drafted + drafted,
        accepted=state.accepted + jnp.minimum(right, count),
        misses=misses,
    )


def _no_drafts(sequences: int) -> Proposal:
    return Proposal(jnp.zeros((sequences, 0), jnp.int32), jnp.zeros(sequences, jnp.int32))


def _useful(state: SpeculativeState, lengths: Int[Array, " R"]) -> Int[Array, " R"]:
    """How many drafts of each sequence to check.

    The token after the last one must be within the limit too. A sequence that has rejected all its
    drafts `PATIENCE` times in a row tries again at every `RETRY`-th token of the longest response:
    at the same time as the others, so that most passes are without drafts.
    """
    room = jnp.maximum(state.info.limit - state.lengths - 1, 0)
    longest = jnp.max(jnp.where(state.finished, 0, state.lengths))
    is_tried = (state.misses < PATIENCE) | (longest % RETRY == 0)
    return jnp.where(is_tried & ~state.finished, jnp.minimum(lengths, room), 0)


def _chosen(
    state: SpeculativeState, scores: Float[Array, "R W V"], draft: Proposal, config: DecodingConfig
) -> Int[Array, "R W"]:
    """The token that follows each beginning of the draft; the processors read the draft too."""
    width = scores.shape[1]
    ids = _written(state, draft.ids, draft.lengths, config)
    generated = state.lengths[:, None] + jnp.arange(width)[None]

    def of_position(
        scores: Array, ids: Array, generated: Array, info: PromptInfo, rng: Key[Array, ""] | None
    ) -> Array:
        return choose_token(scores, ids, generated, info, rng, config)

    of_sequence = jax.vmap(of_position, in_axes=(0, None, 0, None, None))
    return jax.vmap(of_sequence)(scores, ids, generated, state.info, state.rngs)


def _next_draft(
    state: SpeculativeState,
    config: DecodingConfig,
    scores: Float[Array, "R V"],
    drafts: Int[Array, "R K"],
    count: Int[Array, ""],
) -> Int[Array, " R"]:
    """The token that the scores of a drafter give after `count` drafts.

    A sampled one is drawn with the random key of the token that it stands for. Equal keys make a
    draw from similar scores the same token (Daliri et al., 2024): as often as the two
    distributions allow, up to a factor below 2 of the misses.
    """
    ids = _written(state, drafts, jnp.broadcast_to(count, state.lengths.shape), config)
    generated = state.lengths + count
    one_each = partial(choose_token, config=config)
    return jax.vmap(one_each)(scores, ids, generated, state.info, state.rngs)


def _written(
    state: SpeculativeState,
    tokens: Int[Array, "R W"],
    count: Int[Array, " R"],
    config: DecodingConfig,
) -> Int[Array, "R P"]:
    """The ids of each sequence with the first `count` of `tokens` after its last one."""
    if not tokens.shape[1]:
        return state.ids
    end = state.ids.shape[1] - config.max_new_tokens + state.lengths
    source = jnp.arange(state.ids.shape[1])[None] - end[:, None]
    is_new = (source >= 0) & (source < count[:, None])
    new = jnp.take_along_axis(tokens, jnp.clip(source, 0, tokens.shape[1] - 1), axis=1)
    return jnp.where(is_new, new, state.ids)
