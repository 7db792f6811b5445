"""Continuous batching: a sequence that ends frees its slot for the next prompt.

A fixed number of slots hold sequences of different lengths. `salm.prefill` runs the prompts and
chooses their first tokens, `admit` puts them into free slots, and `decode` generates tokens for all
slots until enough sequences have ended. Each of the three is compiled once. The tokens are those of
`salm`. With speculative decoding the slots are a `SpeculativeState`.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation import speculative
from speechlm2_jax.generation.decoding import (
    CachedDecoder,
    DecodingConfig,
    PromptInfo,
    SlotDecoder,
    choose_token,
    run_token,
)
from speechlm2_jax.generation.salm import DecodingState, GenerationState
from speechlm2_jax.generation.speculative import SpeculativeState
from speechlm2_jax.layers.cache import DraftCache, RingCache
from speechlm2_jax.layers.paged_cache import PagedCache
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.layers.unstacked import read_in_place
from speechlm2_jax.sharding import constrain

T = TypeVar("T")


class PlainSlots(NamedTuple):
    """State of R slots without drafts; a free slot counts as ended."""

    ids: Int[Array, "R A"]
    """The tokens generated so far, padded after the end."""
    lengths: Int[Array, " R"]
    ended: Bool[Array, " R"]
    cache: RingCache | PagedCache
    info: PromptInfo
    rngs: Key[Array, " R"] | None


Slots = PlainSlots | SpeculativeState


class SlotOutput(NamedTuple):
    """The tokens of R slots so far."""

    ids: Int[Array, "R A"]
    """Padded after the end."""
    lengths: Int[Array, " R"]
    ended: Bool[Array, " R"]
    drafted: Int[Array, " R"] | None
    """Draft tokens that were checked; None without speculative decoding."""
    accepted: Int[Array, " R"] | None
    """Draft tokens that are part of the response."""


class SlotShape(NamedTuple):
    """How many slots there are, and what they have room for."""

    count: int
    prompt_tokens: int
    draft_tokens: int = 0
    """Longest text of the drafter (`Prompts.drafts`), if there is one."""


def empty(
    decoder: SlotDecoder, shape: SlotShape, config: DecodingConfig, dtype: jnp.dtype
) -> Slots:
    """Makes free slots."""
    # the last token is never fed back, so it needs no cache position
    new = max(config.max_new_tokens - 1, 1) + config.draft_tokens
    count, prompt_tokens, width = shape
    none = jnp.zeros(count, jnp.int32)
    common: dict[str, Any] = dict(
        ids=jnp.full((count, config.max_new_tokens), config.pad_id, jnp.int32),
        lengths=none,
        info=PromptInfo(position=none, length=none, first=none, limit=none),
        rngs=jax.random.split(jax.random.key(0), count) if config.do_sample else None,
    )
    ended = jnp.ones(count, bool)
    if config.drafter is None:
        cache = decoder.slot_cache(count, prompt_tokens, new, dtype)
        return PlainSlots(cache=cache, ended=ended, **common)
    cache = decoder.new_cache(count, prompt_tokens + new, dtype)
    return SpeculativeState(
        cache=DraftCache.after_prompts(cache, prompt_tokens, none, config.draft_tokens),
        finished=ended,
        draft=config.drafter.empty(count, width, config.max_new_tokens),
        drafted=none,
        accepted=none,
        misses=none,
        **common,
    )


def admit(slots: Slots, prefilled: GenerationState, at: Int[Array, "G P"]) -> Slots:
    """Puts prefilled sequences into slots: P of each of G groups into this group's slots `at`.

    A group's slots are adjacent; those beyond its last are dropped. The sequences must be prefilled
    with the configuration of the slots and without prompt ids: processors read the response only.
    """

    def put(old: T, new: T) -> T:
        return jax.tree.map(lambda kept, rows: put_rows(kept, rows, at), old, new)

    if isinstance(slots, SpeculativeState):
        assert isinstance(prefilled, SpeculativeState)
        kept = put(_without_caches(slots), _without_caches(prefilled))
        return kept._replace(
            cache=slots.cache.admit(at, prefilled.cache),
            draft=slots.draft.admit(prefilled.draft, at),
        )
    assert isinstance(prefilled, DecodingState)
    own = (slots.ids, slots.lengths, slots.ended, slots.info, slots.rngs)
    new = (prefilled.ids, prefilled.lengths, prefilled.finished, prefilled.info, prefilled.rngs)
    ids, lengths, ended, info, rngs = put(own, new)
    cache = slots.cache.admit(at, prefilled.cache)
    return PlainSlots(ids=ids, lengths=lengths, ended=ended, cache=cache, info=info, rngs=rngs)


def read(slots: Slots) -> SlotOutput:
    """The tokens so far, and which sequences have ended."""
    if isinstance(slots, SpeculativeState):
        counts = (slots.drafted, slots.accepted)
        return SlotOutput(slots.ids, slots.lengths, slots.finished, *counts)
    return SlotOutput(slots.ids, slots.lengths, slots.ended, None, None)


def _without_caches(state: SpeculativeState) -> Any:
    return state._replace(cache=None, draft=None)


def constrained(slots: Slots) -> Slots:
    """Constrains the sharding of every array, so that one program's output fits the next."""
    if isinstance(slots, SpeculativeState):
        return speculative.constrained(slots)

    def by_slot(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1)))

    rest = jax.tree.map(by_slot, slots._replace(cache=None))
    return rest._replace(cache=slots.cache.constrained())


def decode(
    decoder: CachedDecoder, slots: Slots, config: DecodingConfig, enough: Int[Array, ""] | int
) -> Slots:
    """Generates tokens for every open sequence until `enough` slots have ended."""
    if isinstance(slots, SpeculativeState):
        assert config.drafter is not None

        def has_too_few(slots: SpeculativeState) -> Array:
            return jnp.sum(slots.finished) < enough

        return speculative.decode_while(has_too_few, decoder, slots, config, config.drafter)
    dtype = slots.cache.dtype

    def is_unfinished(slots: PlainSlots) -> Array:
        return jnp.sum(slots.ended) < enough

    def advance(slots: PlainSlots) -> PlainSlots:
        latest = jnp.maximum(slots.lengths - 1, 0)
        token = jnp.take_along_axis(slots.ids, latest[:, None], axis=1)[:, 0]
        position = slots.info.position + latest
        hidden, cache = run_token(decoder, slots.cache, token, position, ~slots.ended, dtype)
        scores = decoder.logits(hidden)[:, 0]
        return _choose(slots._replace(cache=cache), scores, config)

    decoder = read_in_place(decoder)
    return jax.lax.while_loop(is_unfinished, advance, slots)


def _choose(slots: PlainSlots, scores: Float[Array, "R V"], config: DecodingConfig) -> PlainSlots:
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
