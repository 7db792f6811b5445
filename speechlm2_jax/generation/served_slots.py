"""Continuous batching for a server: every slot has sampling settings and a limit of its own.

- `extend_prompts` runs a few positions of new prompts, so that the prefill of a long prompt takes
  several short calls.
- `admit` chooses the first tokens and puts the sequences into slots.
- `decode` adds up to a given number of tokens to every open sequence, so that new sequences can
  join between two calls.

The tokens are those of `salm` with the same settings and random keys.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation import slots as loop
from speechlm2_jax.generation.decoding import (
    CachedDecoder,
    DecodingConfig,
    PromptInfo,
    SlotDecoder,
    process_scores,
    run_token,
)
from speechlm2_jax.generation.processors import WITHOUT_LOOPS_N, Keep, NoRepeatNgrams
from speechlm2_jax.generation.slots import PlainSlots
from speechlm2_jax.generation.warpers import keep_top_h, keep_top_p
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.layers.unstacked import read_in_place
from speechlm2_jax.sharding import constrain

LOOPS = (NoRepeatNgrams(n=WITHOUT_LOOPS_N),)


class OwnSampling(NamedTuple):
    """How the tokens of each of R sequences are chosen."""

    is_sampled: Bool[Array, " R"]
    """False: the most likely token."""
    temperature: Float[Array, " R"]
    """Divides the scores, if `is_sampled`."""
    top_p: Float[Array, " R"]
    """Keep the smallest set of most likely tokens whose probabilities reach this sum."""
    avoids_loops: Bool[Array, " R"]
    """No n-gram of WITHOUT_LOOPS_N tokens occurs twice in the response."""


class ServedSlots(NamedTuple):
    """State of R slots; a free slot counts as ended."""

    slots: PlainSlots
    sampling: OwnSampling
    logprobs: Float[Array, "R A"]
    """Log-probability of each generated token under the model, before sampling settings."""


class StagedPrompts(NamedTuple):
    """P prompts whose prefill is under way."""

    cache: KVCache
    hidden: Float[Array, "P 1 D"]
    """Hidden state at the last position of each prompt, once it has been run."""


class PromptRows(NamedTuple):
    """P prompts as embeddings, padded on the right."""

    embeds: Float[Array, "P T D"]
    attention_mask: Bool[Array, "P T"]
    """True at the positions that may be attended to; False after the end of a prompt."""
    lengths: Int[Array, " P"]
    """Positions of each prompt; 0 for padding."""


class NewSequences(NamedTuple):
    """What P prompts bring into their slots, beside their KV cache."""

    at: Int[Array, "G P"]
    """The slot of each prompt within its group; an index beyond the last slot for padding."""
    limits: Int[Array, " P"]
    """Largest number of new tokens of each."""
    rngs: Key[Array, " P"]
    sampling: OwnSampling


class ServedOutput(NamedTuple):
    """The tokens of R slots so far."""

    ids: Int[Array, "R A"]
    lengths: Int[Array, " R"]
    ended: Bool[Array, " R"]
    logprobs: Float[Array, "R A"]


def empty(
    decoder: SlotDecoder, shape: loop.SlotShape, config: DecodingConfig, dtype: jnp.dtype
) -> ServedSlots:
    """Makes free slots. `config.do_sample` must be True: every slot has a random key."""
    assert config.do_sample and config.drafter is None
    slots = loop.empty(decoder, shape, config, dtype)
    assert isinstance(slots, PlainSlots)
    rows = shape.count
    never = jnp.zeros(rows, bool)
    sampling = OwnSampling(never, jnp.ones(rows), jnp.ones(rows), never)
    return ServedSlots(slots, sampling, jnp.zeros((rows, config.max_new_tokens)))


def stage(
    decoder: CachedDecoder, prompts: int, capacity: int, width: int, dtype: jnp.dtype
) -> StagedPrompts:
    """Makes room for `prompts` prompts of up to `capacity` positions."""
    cache = decoder.new_cache(prompts, capacity, dtype)
    return StagedPrompts(cache, jnp.zeros((prompts, 1, width), dtype))


def extend_prompts(
    decoder: CachedDecoder,
    staged: StagedPrompts,
    prompts: PromptRows,
    start: Int[Array, ""],
    tokens: int,
    *,
    is_first: bool,
) -> StagedPrompts:
    """Runs positions `start` to `start + tokens` of every prompt.

    The calls must follow one another from position 0 on; `is_first`: this is the first.
    """
    place = jnp.arange(prompts.embeds.shape[1])[None]
    mask = prompts.attention_mask & (place < prompts.lengths[:, None])
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

    def part(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, tokens, axis=1)

    hidden, cache = decoder.extend(
        part(prompts.embeds),
        staged.cache,
        positions=part(positions),
        attention_mask=part(mask),
        is_first=is_first,
    )
    last = prompts.lengths - 1 - start
    index = jnp.clip(last, 0, tokens - 1)[:, None, None]
    is_here = ((last >= 0) & (last < tokens))[:, None, None]
    own = jnp.take_along_axis(hidden, index, axis=1)
    return StagedPrompts(cache, jnp.where(is_here, own, staged.hidden))


def admit(
    decoder: CachedDecoder,
    served: ServedSlots,
    staged: StagedPrompts,
    prompts: PromptRows,
    new: NewSequences,
    config: DecodingConfig,
) -> ServedSlots:
    """Chooses the first token of every staged prompt, and puts the sequences into their slots."""
    rows, zero = len(prompts.lengths), jnp.zeros(len(prompts.lengths), jnp.int32)
    info = PromptInfo(
        position=jnp.sum(prompts.attention_mask, axis=1, dtype=jnp.int32),
        length=prompts.lengths,
        first=zero,
        limit=new.limits,
    )
    ids = jnp.full((rows, config.max_new_tokens), config.pad_id, jnp.int32)
    scores = decoder.logits(staged.hidden)[:, 0]
    token, logprob = _choose(scores, ids, zero, info, (new.rngs, new.sampling), config)
    ids = ids.at[:, 0].set(token)
    logprobs = jnp.zeros(ids.shape).at[:, 0].set(logprob)
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    fresh = (ids, zero + 1, stops | (new.limits <= 1), info, new.rngs, new.sampling, logprobs)
    slots = served.slots
    old = (slots.ids, slots.lengths, slots.ended, slots.info, slots.rngs)
    both = jax.tree.map(
        lambda kept, own: put_rows(kept, own, new.at),
        (*old, served.sampling, served.logprobs),
        fresh,
    )
    ids, lengths, ended, info, rngs, sampling, logprobs = both
    cache = slots.cache.admit(new.at, staged.cache)
    return ServedSlots(PlainSlots(ids, lengths, ended, cache, info, rngs), sampling, logprobs)


def decode(
    decoder: CachedDecoder,
    served: ServedSlots,
    config: DecodingConfig,
    is_kept: Bool[Array, " R"],
    tokens: Int[Array, ""],
) -> ServedSlots:
    """Adds up to `tokens` tokens to every open sequence.

    Sequences whose `is_kept` is False end at once: they were cancelled.
    """
    dtype = served.slots.cache.dtype
    slots = served.slots._replace(ended=served.slots.ended | ~is_kept)

    def is_unfinished(state: tuple[Array, ServedSlots]) -> Array:
        return (state[0] < tokens) & ~jnp.all(state[1].slots.ended)

    def advance(state: tuple[Array, ServedSlots]) -> tuple[Array, ServedSlots]:
        count, served = state
        slots = served.slots
        latest = jnp.maximum(slots.lengths - 1, 0)
        token = jnp.take_along_axis(slots.ids, latest[:, None], axis=1)[:, 0]
        position = slots.info.position + latest
        hidden, cache = run_token(decoder, slots.cache, token, position, ~slots.ended, dtype)
        scores = decoder.logits(hidden)[:, 0]
        served = served._replace(slots=slots._replace(cache=cache))
        return count + 1, _extended(served, scores, config)

    decoder = read_in_place(decoder)
    start = (jnp.zeros((), jnp.int32), served._replace(slots=slots))
    return jax.lax.while_loop(is_unfinished, advance, start)[1]


def read(served: ServedSlots) -> ServedOutput:
    """The tokens so far, and which sequences have ended."""
    slots = served.slots
    return ServedOutput(slots.ids, slots.lengths, slots.ended, served.logprobs)


def constrained(served: ServedSlots) -> ServedSlots:
    """Constrains the sharding of every array, so that one program's output fits the next."""
    slots = loop.constrained(served.slots)
    assert isinstance(slots, PlainSlots)

    def by_slot(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1)))

    rest = jax.tree.map(by_slot, (served.sampling, served.logprobs))
    return ServedSlots(slots, *rest)


def _extended(
    served: ServedSlots, scores: Float[Array, "R V"], config: DecodingConfig
) -> ServedSlots:
    """Adds a token to every open sequence."""
    slots = served.slots
    assert slots.rngs is not None
    own = (slots.rngs, served.sampling)
    token, logprob = _choose(scores, slots.ids, slots.lengths, slots.info, own, config)
    is_next = jnp.arange(slots.ids.shape[1])[None] == slots.lengths[:, None]
    is_next &= ~slots.ended[:, None]
    lengths = slots.lengths + ~slots.ended
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    slots = slots._replace(
        ids=jnp.where(is_next, token[:, None], slots.ids),
        lengths=lengths,
        ended=slots.ended | stops | (lengths >= slots.info.limit),
    )
    logprobs = jnp.where(is_next, logprob[:, None], served.logprobs)
    return served._replace(slots=slots, logprobs=logprobs)


def _choose(
    scores: Float[Array, "R V"],
    ids: Int[Array, "R A"],
    generated: Int[Array, " R"],
    info: PromptInfo,
    own: tuple[Key[Array, " R"], OwnSampling],
    config: DecodingConfig,
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Chooses the next token of each sequence, after `generated` tokens of its response.

    Returns the tokens and their log-probabilities.
    """
    rngs, sampling = own
    shared = tuple(p for p in config.processors if not isinstance(p, Keep))
    changed = _processed(scores, ids, generated, info, replace(config, processors=shared))
    changed = jax.lax.cond(
        jnp.any(sampling.avoids_loops),
        lambda: jnp.where(
            sampling.avoids_loops[:, None],
            _processed(changed, ids, generated, info, replace(config, processors=LOOPS)),
            changed,
        ),
        lambda: changed,
    )

    def drawn() -> Array:
        warped = _warped(changed / sampling.temperature[:, None], sampling, config)
        step = jax.vmap(jax.random.fold_in)(rngs, generated)
        return jax.vmap(jax.random.categorical)(step, warped).astype(jnp.int32)

    greedy = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    token = jax.lax.cond(
        jnp.any(sampling.is_sampled),
        lambda: jnp.where(sampling.is_sampled, drawn(), greedy),
        lambda: greedy,
    )
    logprobs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def _warped(
    scores: Float[Array, "R V"], sampling: OwnSampling, config: DecodingConfig
) -> Float[Array, "R V"]:
    """Truncates the distributions by the top-p of each sequence and by the rules that all share.

    The order is that of `SALM.generate`: top-h comes before top-p, all others after it.
    """
    rules = [p for p in config.processors if isinstance(p, Keep)]
    for own in (p for p in rules if p.rule is keep_top_h):
        scores = own.rule(scores, own.value, own.least)
    is_cut = sampling.is_sampled & (sampling.top_p < 1.0)
    scores = jax.lax.cond(jnp.any(is_cut), _truncated, lambda x, *_: x, scores, sampling.top_p)
    for own in (p for p in rules if p.rule is not keep_top_h):
        scores = own.rule(scores, own.value, own.least)
    return scores


def _processed(
    scores: Float[Array, "R V"],
    ids: Int[Array, "R A"],
    generated: Int[Array, " R"],
    info: PromptInfo,
    config: DecodingConfig,
) -> Float[Array, "R V"]:
    """The scores after the processors that all sequences share. One at a time: lengths differ."""
    if not config.processors:
        return scores.astype(jnp.float32)

    def of_one(scores: Array, ids: Array, generated: Array, info: PromptInfo) -> Array:
        one = jax.tree.map(lambda x: x[None], info)
        return process_scores(scores[None], ids[None], generated, one, config)[0]

    return jax.vmap(of_one)(scores, ids, generated, info)


def _truncated(scores: Float[Array, "R V"], top_p: Float[Array, " R"]) -> Float[Array, "R V"]:
    kept = jax.vmap(lambda own, p: keep_top_p(own[None], p)[0])(scores, top_p)
    return jnp.where((top_p < 1.0)[:, None], kept, scores)
