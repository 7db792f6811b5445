"""Answering: prompts as embeddings in, token ids out, in one compiled loop.

`prefill` runs the prompts and chooses the first token, `decode` chooses further ones up to a number
that may be traced, and `read_outputs` reads off what there is: answering in one go, streaming and
stopping early run the same two programs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation import beams
from speechlm2_jax.generation.beams import BeamSearchState
from speechlm2_jax.generation.decoding import (
    BeamConfig,
    CachedDecoder,
    DecodingConfig,
    Prompts,
    Rows,
    copied_rngs,
    process_scores,
    run_prompts,
    run_token,
    step_rngs,
)
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.cpu import read_in_place
from speechlm2_jax.sharding import constrain

__all__ = [
    "GenerationOutput",
    "BeamConfig",
    "CachedDecoder",
    "DecodingConfig",
    "Prompts",
    "read_outputs",
    "prefill",
    "generate_tokens",
    "decode",
    "constrained",
]


class DecodingState(NamedTuple):
    """State of the loop that follows one path per row."""

    step: Int[Array, ""]
    """Tokens chosen so far, per row."""
    ids: Int[Array, "R H"]
    lengths: Int[Array, " R"]
    finished: Bool[Array, " R"]
    cache: KVCache
    rows: Rows
    rngs: Key[Array, " R"] | None


class GenerationOutput(NamedTuple):
    """What has been said so far, R = prompts x answers to each."""

    ids: Int[Array, "R A"]
    """Padded after each row's end."""
    lengths: Int[Array, " R"]
    scores: Float[Array, " R"] | None
    """Of beam search: log-probability over length to the power of the length penalty."""
    ended: Bool[Array, " R"]
    """Rows of which nothing more will come."""


GenerationState = DecodingState | BeamSearchState


def generate_tokens(
    decoder: CachedDecoder,
    embeds: Float[Array, "B T D"],
    *,
    lengths: Int[Array, " B"],
    attention_mask: Bool[Array, "B T"],
    config: DecodingConfig,
    rngs: Key[Array, " B"] | None = None,
) -> Int[Array, "R A"]:
    """Generates from prompts that are padded on the right: A = `config.max_new_tokens` ids each.

    `lengths`, `attention_mask` and `rngs` are those of `Prompts`. A sequence that has ended is
    filled with the pad id. The loop stops when all have ended. Pure; one program per shape and
    config.
    """
    prompts = Prompts(embeds, lengths, attention_mask, rngs=rngs)
    state = decode(decoder, prefill(decoder, prompts, config), config, config.max_new_tokens)
    return read_outputs(state, config).ids


def prefill(decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig) -> GenerationState:
    """Runs the prompts and chooses the first token of every row."""
    if config.beams is not None:
        return beams.prefill(decoder, prompts, config, config.beams)
    prompt = run_prompts(decoder, prompts, config)
    finished = jnp.repeat(prompts.lengths == 0, config.copies)
    start = DecodingState(
        step=jnp.zeros((), jnp.int32),
        ids=prompt.ids,
        lengths=jnp.zeros(len(finished), jnp.int32),
        finished=finished,
        cache=prompt.cache,
        rows=prompt.rows,
        rngs=copied_rngs(prompts.rngs, config.copies),
    )
    return _choose(decoder, start, prompt.hidden, config)


def decode(
    decoder: CachedDecoder,
    state: GenerationState,
    config: DecodingConfig,
    until: Int[Array, ""] | int,
) -> GenerationState:
    """Chooses tokens until there are `until` of them or every row has ended."""
    if isinstance(state, BeamSearchState):
        assert config.beams is not None
        return beams.decode(decoder, state, config, config.beams, until)
    dtype = state.cache.keys.dtype
    before = state.ids.shape[1] - config.max_new_tokens

    def is_unfinished(state: DecodingState) -> Array:
        return (state.step < until) & ~jnp.all(state.finished)

    def advance(state: DecodingState) -> DecodingState:
        token = jax.lax.dynamic_slice_in_dim(state.ids, before + state.step - 1, 1, axis=1)[:, 0]
        place = state.rows.place + state.step - 1
        hidden, cache = run_token(decoder, state.cache, token, place, ~state.finished, dtype)
        return _choose(decoder, state._replace(cache=cache), hidden, config)

    with read_in_place(decoder):
        return jax.lax.while_loop(is_unfinished, advance, state)


def constrained(state: GenerationState) -> GenerationState:
    """The state with every array where it belongs: what one program leaves, the next finds."""

    def by_row(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1))[: x.ndim])

    rest = jax.tree.map(by_row, state._replace(cache=None))
    return rest._replace(cache=state.cache.constrained())


def read_outputs(state: GenerationState, config: DecodingConfig) -> GenerationOutput:
    """Reads off what has been said; of beam search, the best of what was found and what is open."""
    if isinstance(state, BeamSearchState):
        assert config.beams is not None
        return GenerationOutput(*beams.best(state, config, config.beams))
    return GenerationOutput(
        ids=state.ids[:, -config.max_new_tokens :],
        lengths=state.lengths,
        scores=None,
        ended=state.finished,
    )


def _choose(
    decoder: CachedDecoder,
    state: DecodingState,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
) -> DecodingState:
    scores = decoder.logits(hidden)[:, 0]
    scores = process_scores(scores, state.ids, state.step, state.rows, config)
    if config.do_sample:
        token: Any = jax.vmap(jax.random.categorical)(step_rngs(state.rngs, state.step), scores)
    else:
        token = jnp.argmax(scores, axis=-1)
    token = jnp.where(state.finished, config.pad_id, token).astype(jnp.int32)
    position = state.ids.shape[1] - config.max_new_tokens + state.step
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    return state._replace(
        step=state.step + 1,
        ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], position, axis=1),
        lengths=state.lengths + ~state.finished,
        finished=state.finished | stops | (state.step + 1 >= state.rows.limit),
    )
