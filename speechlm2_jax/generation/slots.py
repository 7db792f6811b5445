"""Continuous batching: a sequence that ends frees its slot for the next prompt.

A fixed number of slots hold sequences of different lengths. `salm.prefill` runs the prompts and
chooses their first tokens, `admit` puts them into free slots, and `decode` generates tokens for all
slots until enough sequences have ended. Each of the three is compiled once. The tokens are those of
`salm`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.decoding import (
    CachedDecoder,
    DecodingConfig,
    PromptInfo,
    choose_token,
    run_token,
)
from speechlm2_jax.generation.salm import DecodingState
from speechlm2_jax.layers.cache import RingCache
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.layers.unstacked import read_in_place
from speechlm2_jax.sharding import constrain


class Slots(NamedTuple):
    """State of R slots; a free slot counts as ended."""

    ids: Int[Array, "R A"]
    """The tokens generated so far, padded after the end."""
    lengths: Int[Array, " R"]
    ended: Bool[Array, " R"]
    cache: RingCache
    info: PromptInfo
    rngs: Key[Array, " R"] | None


def empty(
    decoder: CachedDecoder,
    count: int,
    prompt_length: int,
    config: DecodingConfig,
    dtype: jnp.dtype,
) -> Slots:
    """Makes free slots for prompts of up to `prompt_length` positions."""
    # the last token is never fed back, so it needs no cache position
    ring = max(config.max_new_tokens - 1, 1)
    none = jnp.zeros(count, jnp.int32)
    return Slots(
        ids=jnp.full((count, config.max_new_tokens), config.pad_id, jnp.int32),
        lengths=none,
        ended=jnp.ones(count, bool),
        cache=RingCache.around(
            decoder.new_cache(count, prompt_length + ring, dtype), prompt_length
        ),
        info=PromptInfo(position=none, length=none, first=none, limit=none),
        rngs=jax.random.split(jax.random.key(0), count) if config.do_sample else None,
    )


def admit(slots: Slots, prefilled: DecodingState, at: Int[Array, "G P"]) -> Slots:
    """Puts prefilled sequences into slots: P of each of G groups into this group's slots `at`.

    A group's slots are adjacent; those beyond its last are dropped. The sequences must be prefilled
    with the configuration of the slots and without prompt ids: processors read the response only.
    """
    own = (slots.ids, slots.lengths, slots.ended, slots.info, slots.rngs)
    new = (prefilled.ids, prefilled.lengths, prefilled.finished, prefilled.info, prefilled.rngs)
    held = jax.tree.map(lambda old, value: put_rows(old, value, at), own, new)
    ids, lengths, ended, info, rngs = held
    cache = slots.cache.admit(at, prefilled.cache)
    return Slots(ids=ids, lengths=lengths, ended=ended, cache=cache, info=info, rngs=rngs)


def constrained(slots: Slots) -> Slots:
    """Constrains the sharding of every array, so that one program's output fits the next."""

    def by_slot(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1)))

    rest = jax.tree.map(by_slot, slots._replace(cache=None))
    return rest._replace(cache=slots.cache.constrained())


def decode(
    decoder: CachedDecoder, slots: Slots, config: DecodingConfig, enough: Int[Array, ""] | int
) -> Slots:
    """Generates tokens for every open sequence until `enough` slots have ended."""
    dtype = slots.cache.keys.dtype

    def is_unfinished(slots: Slots) -> Array:
        return jnp.sum(slots.ended) < enough

    def advance(slots: Slots) -> Slots:
        latest = jnp.maximum(slots.lengths - 1, 0)
        token = jnp.take_along_axis(slots.ids, latest[:, None], axis=1)[:, 0]
        position = slots.info.position + latest
        hidden, cache = run_token(decoder, slots.cache, token, position, ~slots.ended, dtype)
        assert isinstance(cache, RingCache)
        scores = decoder.logits(hidden)[:, 0]
        return _choose(slots._replace(cache=cache), scores, config)

    decoder = read_in_place(decoder)
    return jax.lax.while_loop(is_unfinished, advance, slots)


def _choose(slots: Slots, scores: Float[Array, "R V"], config: DecodingConfig) -> Slots:
    """Adds a token to every open sequence. One at a time (vmap): their lengths differ."""

    def of_slot(
        scores: Array, ids: Array, generated: Array, info: PromptInfo, rng: Key[Array, ""] | None
    ) -> Array:
        return choose_token(scores, ids, generated, info, rng, config)

    token = jax.vmap(of_slot)(scores, slots.ids, slots.lengths, slots.info, slots.rngs)
    is_next = jnp.arange(slots.ids.shape[1])[None] == slots.lengths[:, None]
    is_next &= ~slots.ended[:, None]
    lengths = slots.lengths + ~slots.ended
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    return slots._replace(
        ids=jnp.where(is_next, token[:, None], slots.ids),
        lengths=lengths,
        ended=slots.ended | stops | (lengths >= slots.info.limit),
    )
