"""Generation of text: prompts as embeddings in, token ids out.

- `prefill` runs the prompts and chooses the first token.
- `decode` generates further tokens in one compiled loop, up to a number that may be traced.
- `read_outputs` returns the tokens so far.

Generation at once, streaming and early stopping run the same two compiled programs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation import beams, speculative
from speechlm2_jax.generation.beams import BeamSearchState
from speechlm2_jax.generation.decoding import (
    BeamConfig,
    CachedDecoder,
    DecodingConfig,
    PromptInfo,
    Prompts,
    copied_rngs,
    process_scores,
    run_prompts,
    run_token,
    token_rngs,
)
from speechlm2_jax.generation.drafts import DraftText
from speechlm2_jax.generation.speculative import SpeculativeState
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.unstacked import read_in_place
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
    """State of the decoding loop without beam search."""

    generated: Int[Array, ""]
    """Number of tokens generated so far."""
    ids: Int[Array, "R P"]
    """Prompt ids, then generated ids."""
    lengths: Int[Array, " R"]
    finished: Bool[Array, " R"]
    cache: KVCache
    info: PromptInfo
    rngs: Key[Array, " R"] | None
    logprobs: Float[Array, "R A"] | None = None
    """Of each generated token; None unless `DecodingConfig.keeps_logprobs`."""


class GenerationOutput(NamedTuple):
    """The tokens generated so far; R = prompts x responses per prompt."""

    ids: Int[Array, "R A"]
    """Padded after the end of each response."""
    lengths: Int[Array, " R"]
    scores: Float[Array, " R"] | None
    """Scores of beam search: log-probability / length ** length_penalty."""
    ended: Bool[Array, " R"]
    """True where the response is complete."""
    drafted: Int[Array, " R"] | None = None
    """Draft tokens that were checked; None without speculative decoding."""
    accepted: Int[Array, " R"] | None = None
    """Draft tokens that are part of the response."""
    logprobs: Float[Array, "R A"] | None = None
    """Log-probability of each token in nats, before logits processors; None if not kept."""


GenerationState = DecodingState | BeamSearchState | SpeculativeState


def generate_tokens(
    decoder: CachedDecoder,
    embeds: Float[Array, "B T D"],
    *,
    lengths: Int[Array, " B"],
    attention_mask: Bool[Array, "B T"],
    config: DecodingConfig,
    rngs: Key[Array, " B"] | None = None,
    drafts: DraftText | None = None,
) -> Int[Array, "R A"]:
    """Generates from prompts that are padded on the right: A = `config.max_new_tokens` ids each.

    `lengths`, `attention_mask`, `rngs` and `drafts` are those of `Prompts`. A sequence that has
    ended is filled with the pad id. The loop stops when all have ended. Pure; one program per shape
    and config.
    """
    prompts = Prompts(embeds, lengths, attention_mask, rngs=rngs, drafts=drafts)
    state = decode(decoder, prefill(decoder, prompts, config), config, config.max_new_tokens)
    return read_outputs(state, config).ids


def prefill(decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig) -> GenerationState:
    """Runs the prompts and chooses the first token of every response."""
    if config.beams is not None:
        return beams.prefill(decoder, prompts, config, config.beams)
    if config.drafter is not None:
        return speculative.prefill(decoder, prompts, config, config.drafter)
    prompt = run_prompts(decoder, prompts, config)
    finished = jnp.repeat(prompts.lengths == 0, config.copies)
    start = DecodingState(
        generated=jnp.zeros((), jnp.int32),
        ids=prompt.ids,
        lengths=jnp.zeros(len(finished), jnp.int32),
        finished=finished,
        cache=prompt.cache,
        info=prompt.info,
        rngs=copied_rngs(prompts.rngs, config.copies),
        logprobs=(
            jnp.zeros((len(finished), config.max_new_tokens)) if config.keeps_logprobs else None
        ),
    )
    return _choose(decoder, start, prompt.hidden, config)


def decode(
    decoder: CachedDecoder,
    state: GenerationState,
    config: DecodingConfig,
    until: Int[Array, ""] | int,
) -> GenerationState:
    """Generates tokens until each response has `until` of them or all have ended.

    With speculative decoding a response may have more.
    """
    if isinstance(state, BeamSearchState):
        assert config.beams is not None
        return beams.decode(decoder, state, config, config.beams, until)
    if isinstance(state, SpeculativeState):
        assert config.drafter is not None
        return speculative.decode(decoder, state, config, config.drafter, until)
    dtype = state.cache.dtype
    prompt_length = state.ids.shape[1] - config.max_new_tokens

    def is_unfinished(state: DecodingState) -> Array:
        return (state.generated < until) & ~jnp.all(state.finished)

    def advance(state: DecodingState) -> DecodingState:
        latest = prompt_length + state.generated - 1
        token = jax.lax.dynamic_slice_in_dim(state.ids, latest, 1, axis=1)[:, 0]
        position = state.info.position + state.generated - 1
        hidden, cache = run_token(decoder, state.cache, token, position, ~state.finished, dtype)
        return _choose(decoder, state._replace(cache=cache), hidden, config)

    decoder = read_in_place(decoder)
    return jax.lax.while_loop(is_unfinished, advance, state)


def constrained(state: GenerationState) -> GenerationState:
    """Constrains the sharding of every array, so that one program's output fits the next."""
    if isinstance(state, SpeculativeState):
        return speculative.constrained(state)

    def by_sequence(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * (x.ndim - 1))[: x.ndim])

    rest = jax.tree.map(by_sequence, state._replace(cache=None))
    return rest._replace(cache=state.cache.constrained())


def read_outputs(state: GenerationState, config: DecodingConfig) -> GenerationOutput:
    """Returns the tokens so far; of beam search, the best finished hypotheses and open beams."""
    if isinstance(state, BeamSearchState):
        assert config.beams is not None
        return GenerationOutput(*beams.best(state, config, config.beams))
    return GenerationOutput(
        ids=state.ids[:, -config.max_new_tokens :],
        lengths=state.lengths,
        scores=None,
        ended=state.finished,
        drafted=state.drafted if isinstance(state, SpeculativeState) else None,
        accepted=state.accepted if isinstance(state, SpeculativeState) else None,
        logprobs=state.logprobs if isinstance(state, DecodingState) else None,
    )


def _choose(
    decoder: CachedDecoder,
    state: DecodingState,
    hidden: Float[Array, "R 1 D"],
    config: DecodingConfig,
) -> DecodingState:
    logits = decoder.logits(hidden)[:, 0]
    scores = process_scores(logits, state.ids, state.generated, state.info, config)
    if config.do_sample:
        token: Any = jax.vmap(jax.random.categorical)(
            token_rngs(state.rngs, state.generated), scores
        )
    else:
        token = jnp.argmax(scores, axis=-1)
    token = jnp.where(state.finished, config.pad_id, token).astype(jnp.int32)
    end = state.ids.shape[1] - config.max_new_tokens + state.generated
    stops = jnp.isin(token, jnp.asarray(config.stop_ids, jnp.int32))
    return state._replace(
        generated=state.generated + 1,
        logprobs=_with_logprob(state, logits, token),
        ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], end, axis=1),
        lengths=state.lengths + ~state.finished,
        finished=state.finished | stops | (state.generated + 1 >= state.info.limit),
    )


def _with_logprob(
    state: DecodingState, logits: Float[Array, "R V"], token: Int[Array, " R"]
) -> Float[Array, "R A"] | None:
    """Adds the log-probability of the chosen tokens, if they are kept; 0 after the end."""
    if state.logprobs is None:
        return None
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
    own = chosen - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    own = jnp.where(state.finished[:, None], 0.0, own)
    return jax.lax.dynamic_update_slice_in_dim(state.logprobs, own, state.generated, axis=1)
