"""Answering without waiting for each other: rows that end make room for further prompts.

The same maths as `salm`, whose `begin` still runs the prompts and chooses their first tokens. Here
a fixed number of slots hold rows of any age: `admit` puts new rows into free ones, `run` chooses
tokens for all of them until enough have ended. One program each, whatever comes and goes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.decoding import (
    CachedDecoder,
    DecodingConfig,
    Rows,
    process_scores,
    run_token,
)
from speechlm2_jax.generation.salm import DecodingState
from speechlm2_jax.layers.cache import RingCache
from speechlm2_jax.layers.cpu import read_in_place


class Slots(NamedTuple):
    """State of R rows, each of its own age; a free one counts as ended."""

    ids: Int[Array, "R A"]
    """What each has said, padded after its end."""
    lengths: Int[Array, " R"]
    ended: Bool[Array, " R"]
    cache: RingCache
    rows: Rows
    rngs: Key[Array, " R"] | None


def empty(
    decoder: CachedDecoder,
    count: int,
    prompt_steps: int,
    config: DecodingConfig,
    dtype: jnp.dtype,
) -> Slots:
    """Makes free slots for prompts of up to `prompt_steps` steps."""
    # the last token is never fed back, so it needs no slot
    ring = max(config.max_new_tokens - 1, 1)
    none = jnp.zeros(count, jnp.int32)
    return Slots(
        ids=jnp.full((count, config.max_new_tokens), config.pad_id, jnp.int32),
        lengths=none,
        ended=jnp.ones(count, bool),
        cache=RingCache.around(decoder.new_cache(count, prompt_steps + ring, dtype), prompt_steps),
        rows=Rows(place=none, steps=none, first=none, limit=none),
        rngs=jax.random.split(jax.random.key(0), count) if config.do_sample else None,
    )


def admit(slots: Slots, begun: DecodingState, at: Int[Array, " G"]) -> Slots:
    """Puts rows that have their first token into the slots `at`; those beyond the last go nowhere.

    The rows must have been begun with the configuration of the slots, and with prompts of audio or
    without their ids: what processors see is the answer alone.
    """
    mine = (slots.ids, slots.lengths, slots.ended, slots.rows, slots.rngs)
    theirs = (begun.ids, begun.lengths, begun.finished, begun.rows, begun.rngs)
    held = jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), mine, theirs)
    ids, lengths, ended, rows, rngs = held
    cache = slots.cache.admit(at, begun.cache)
    return Slots(ids=ids, lengths=lengths, ended=ended, cache=cache, rows=rows, rngs=rngs)


def run(
    decoder: CachedDecoder, slots: Slots, config: DecodingConfig, enough: Int[Array, ""] | int
) -> Slots:
    """Chooses tokens for every row that has not ended until `enough` rows have."""
    dtype = slots.cache.keys.dtype

    def is_unfinished(slots: Slots) -> Array:
        return jnp.sum(slots.ended) < enough

    def advance(slots: Slots) -> Slots:
        latest = jnp.maximum(slots.lengths - 1, 0)
        token = jnp.take_along_axis(slots.ids, latest[:, None], axis=1)[:, 0]
        place = slots.rows.place + latest
        hidden, cache = run_token(decoder, slots.cache, token, place, ~slots.ended, dtype)
        assert isinstance(cache, RingCache)
        scores = decoder.logits(hidden)[:, 0]
        return _choose(slots._replace(cache=cache), scores, config)

    with read_in_place(decoder):
        return jax.lax.while_loop(is_unfinished, advance, slots)


def _choose(slots: Slots, scores: Float[Array, "R V"], config: DecodingConfig) -> Slots:
    """Adds a token to every row that goes on, each by itself: they are of different ages."""

    def of_row(
        scores: Array, ids: Array, step: Array, rows: Rows, key: Key[Array, ""] | None
    ) -> Array:
        own = jax.tree.map(lambda x: x[None], rows)
        changed = process_scores(scores[None], ids[None], step, own, config)[0]
        if key is None:
            return jnp.argmax(changed, axis=-1)
        return jax.random.categorical(jax.random.fold_in(key, step), changed)

    token = jax.vmap(of_row)(scores, slots.ids, slots.lengths, slots.rows, slots.rngs)
    token = token.astype(jnp.int32)
    is_next = jnp.arange(slots.ids.shape[1])[None] == slots.lengths[:, None]
    is_next &= ~slots.ended[:, None]
    lengths = slots.lengths + ~slots.ended
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    return slots._replace(
        ids=jnp.where(is_next, token[:, None], slots.ids),
        lengths=lengths,
        ended=slots.ended | stops | (lengths >= slots.rows.limit),
    )
