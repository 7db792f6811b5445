"""Answering: prompts as embeddings in, token ids out, in one compiled loop.

`begin` runs the prompts and chooses the first token, `go_on` chooses further ones up to a number
that may be traced, and `answers` reads off what there is: answering in one go, streaming and
stopping early run the same two programs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation import beams
from speechlm2_jax.generation.beams import Searching
from speechlm2_jax.generation.decoding import (
    BeamConfig,
    CachedDecoder,
    DecodingConfig,
    Prompts,
    Rows,
    copied_keys,
    feed,
    prefill,
    processed,
    step_keys,
)
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.module import read_in_place
from speechlm2_jax.sharding import constrain

__all__ = [
    "Answers",
    "BeamConfig",
    "CachedDecoder",
    "DecodingConfig",
    "Prompts",
    "answers",
    "begin",
    "decode",
    "go_on",
    "pinned",
]


class Answering(NamedTuple):
    """State of the loop that follows one path per row."""

    step: Int[Array, ""]
    """Tokens chosen so far, per row."""
    ids: Int[Array, "R H"]
    lengths: Int[Array, " R"]
    finished: Bool[Array, " R"]
    cache: KVCache
    rows: Rows
    keys: Key[Array, " R"] | None


class Answers(NamedTuple):
    """What has been said so far, R = prompts x answers to each."""

    ids: Int[Array, "R A"]
    """Padded after each row's end."""
    lengths: Int[Array, " R"]
    scores: Float[Array, " R"] | None
    """Of beam search: log-probability over length to the power of the length penalty."""
    ended: Bool[Array, " R"]
    """Rows of which nothing more will come."""


State = Answering | Searching


def decode(
    decoder: CachedDecoder,
    embeds: Float[Array, "B T D"],
    *,
    lengths: Int[Array, " B"],
    is_key: Bool[Array, "B T"],
    config: DecodingConfig,
    keys: Key[Array, " B"] | None = None,
) -> Int[Array, "R A"]:
    """Answers prompts that are padded on the right; A = `config.max_new_tokens` ids per row.

    `lengths`, `is_key` and `keys` are those of `Prompts`. A row that has ended is filled with the
    pad id, and the loop stops when all have. Pure; one program per shape and config.
    """
    prompts = Prompts(embeds, lengths, is_key, keys=keys)
    state = go_on(decoder, begin(decoder, prompts, config), config, config.max_new_tokens)
    return answers(state, config).ids


def begin(decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig) -> State:
    """Runs the prompts and chooses the first token of every row."""
    if config.beams is not None:
        return beams.begin(decoder, prompts, config, config.beams)
    prompt = prefill(decoder, prompts, config)
    finished = jnp.repeat(prompts.lengths == 0, config.copies)
    start = Answering(
        step=jnp.zeros((), jnp.int32),
        ids=prompt.ids,
        lengths=jnp.zeros(len(finished), jnp.int32),
        finished=finished,
        cache=prompt.cache,
        rows=prompt.rows,
        keys=copied_keys(prompts.keys, config.copies),
    )
    return _choose(decoder, start, prompt.hidden, config)


def go_on(
    decoder: CachedDecoder, state: State, config: DecodingConfig, until: Int[Array, ""] | int
) -> State:
    """Chooses tokens until there are `until` of them or every row has ended."""
    if isinstance(state, Searching):
        assert config.beams is not None
        return beams.go_on(decoder, state, config, config.beams, until)
    dtype = state.cache.keys.dtype
    before = state.ids.shape[1] - config.max_new_tokens

    def is_unfinished(state: Answering) -> Array:
        return (state.step < until) & ~jnp.all(state.finished)

    def advance(state: Answering) -> Answering:
        token = jax.lax.dynamic_slice_in_dim(state.ids, before + state.step - 1, 1, axis=1)[:, 0]
        place = state.rows.place + state.step - 1
        hidden, cache = feed(decoder, state.cache, token, place, ~state.finished, dtype)
        return _choose(decoder, state._replace(cache=cache), hidden, config)

    with read_in_place(decoder):
        return jax.lax.while_loop(is_unfinished, advance, state)


def pinned(state: State) -> State:
    """The state with every array where it belongs: what one program leaves, the next finds."""

    def by_row(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1))[: x.ndim])

    rest = jax.tree.map(by_row, state._replace(cache=None))
    return rest._replace(cache=state.cache.pinned())


def answers(state: State, config: DecodingConfig) -> Answers:
    """Reads off what has been said; of beam search, the best of what was found and what is open."""
    if isinstance(state, Searching):
        assert config.beams is not None
        return Answers(*beams.best(state, config, config.beams))
    return Answers(
        ids=state.ids[:, -config.max_new_tokens :],
        lengths=state.lengths,
        scores=None,
        ended=state.finished,
    )


def _choose(
    decoder: CachedDecoder,
    state: Answering,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
) -> Answering:
    scores = decoder.logits(hidden)[:, 0]
    scores = processed(scores, state.ids, state.step, state.rows, config)
    if config.do_sample:
        token: Any = jax.vmap(jax.random.categorical)(step_keys(state.keys, state.step), scores)
    else:
        token = jnp.argmax(scores, axis=-1)
    token = jnp.where(state.finished, config.pad_id, token).astype(jnp.int32)
    slot = state.ids.shape[1] - config.max_new_tokens + state.step
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    return state._replace(
        step=state.step + 1,
        ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], slot, axis=1),
        lengths=state.lengths + ~state.finished,
        finished=state.finished | stops | (state.step + 1 >= state.rows.limit),
    )
