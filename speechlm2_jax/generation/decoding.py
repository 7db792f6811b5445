"""Shared by greedy decoding, sampling and beam search: configuration, prompt pass, one token."""

from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.drafts import Drafter
from speechlm2_jax.generation.processors import History, Processor, process
from speechlm2_jax.generation.warpers import Number
from speechlm2_jax.layers.cache import KVCache, RingCache
from speechlm2_jax.layers.decoding_cache import CachedOutput, DecodingCache
from speechlm2_jax.layers.paged_cache import PagedCache
from speechlm2_jax.pytrees import register_pytree

STATIC = {"static": True}
Id = TypeVar("Id")
"""A token id: `int` on the host, `Array` inside a compiled program."""
COPIES_SALT = 2**31 - 1
"""Separates the random keys of a prompt's further returned sequences from those of its tokens."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """Beam search with the semantics of Hugging Face's `_beam_search`."""

    count: int = field(metadata=STATIC)
    """Number of beams."""
    length_penalty: Number = 1.0
    """A hypothesis is scored by its log-probability / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = field(default=False, metadata=STATIC)
    """When the search for a prompt ends.

    - True: `count` hypotheses are finished.
    - False: the best open beam, at its present length, scores below the worst of these.
    - "never": the best open beam can no longer beat the worst of these at any length.
    """


@register_pytree
@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Generic[Id]):
    """How to generate. A pytree: its numbers may be arguments of a compiled program.

    If all numbers are Python's, it is hashable and may be a static argument itself.
    """

    max_new_tokens: int = field(metadata=STATIC)
    """Capacity for new tokens; `Prompts.limits` may set a lower limit per prompt."""
    stop_ids: tuple[Id, ...]
    """End tokens. A response ends with the first of them, which is part of it."""
    pad_id: Id
    """Id that pads a response after its end."""
    processors: tuple[Processor, ...] = ()
    """Applied to the logits in this order, before a token is chosen."""
    do_sample: bool = field(default=False, metadata=STATIC)
    """Sample the next token; otherwise take the most likely one."""
    return_sequences: int = field(default=1, metadata=STATIC)
    """Responses per prompt (`num_return_sequences`); those of one prompt are adjacent."""
    beams: BeamConfig | None = None
    drafter: Drafter | None = None
    """Speculative decoding, not with beams: where draft tokens come from."""
    keeps_logprobs: bool = field(default=False, metadata=STATIC)
    """Keep the log-probability of every generated token; neither with beams nor with a drafter."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.beams is not None and self.drafter is not None:
            raise ValueError("speculative decoding is not supported with beam search")
        if self.keeps_logprobs and (self.beams is not None or self.drafter is not None):
            raise ValueError("token_logprobs is not supported with beam search or drafts")

    @property
    def copies(self) -> int:
        """Sequences that are decoded for each prompt: beams, or responses."""
        return self.return_sequences if self.beams is None else self.beams.count

    @property
    def draft_tokens(self) -> int:
        """Most draft tokens that the LLM runs at once; 0 without speculative decoding."""
        return 0 if self.drafter is None else self.drafter.tokens


@runtime_checkable
class CachedDecoder(Protocol):
    """A language model with a KV cache (`llm.decoder.Decoder`)."""

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up token embeddings."""
        ...

    def new_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """Makes an empty KV cache."""
        ...

    def extend(
        self,
        embeds: Float[Array, "B T D"],
        cache: DecodingCache,
        *,
        positions: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        is_first: bool = False,
        unpacked: bool = False,
    ) -> CachedOutput:
        """Runs further tokens of the sequences in the cache, which is empty if `is_first`."""
        ...

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes the logits of every token."""
        ...


@runtime_checkable
class SlotDecoder(CachedDecoder, Protocol):
    """A language model for continuous batching."""

    def slot_cache(
        self, slots: int, prompt_tokens: int, new_tokens: int, dtype: DTypeLike
    ) -> RingCache | PagedCache:
        """Makes an empty cache for slots with room for such prompts and responses."""
        ...


class Prompts(NamedTuple):
    """Prompts [B, T], padded on the right."""

    embeds: Float[Array, "B T D"]
    lengths: Int[Array, " B"]
    """Positions of each prompt. A prompt of length 0 is padding: nothing is generated."""
    attention_mask: Bool[Array, "B T"]
    """False after each length, and at positions that may not be attended to."""
    limits: Int[Array, " B"] | None = None
    """Largest number of new tokens per prompt; None: `max_new_tokens`."""
    ids: Int[Array, "B T"] | None = None
    """Token ids, if processors read them."""
    rngs: Key[Array, " B"] | None = None
    """One random key per prompt, for sampling."""
    drafts: Any = None
    """What `DecodingConfig.drafter` starts from: a `DraftText`, or `draft_llm.DraftPrompts`."""
    unpacked: bool = False
    """True only if `attention_mask` is True at all positions of each prompt."""


class PromptInfo(NamedTuple):
    """What decoding reads of the prompts; R sequences are decoded."""

    position: Int[Array, " R"]
    """Position of the first new token. As in Hugging Face, positions count attended tokens."""
    length: Int[Array, " R"]
    """Positions of the prompt."""
    first: Int[Array, " R"]
    """Index of the prompt's first token in `Prefilled.ids`."""
    limit: Int[Array, " R"]
    """Largest number of new tokens."""


class Prefilled(NamedTuple):
    """Outcome of the prompt pass: `copies` adjacent sequences for each prompt."""

    hidden: Float[Array, "R 1 D"]
    """Hidden state at the last position of each prompt."""
    cache: KVCache
    ids: Int[Array, "R P"]
    """Prompt ids (if known, padded on the left), then `max_new_tokens` ids for the response."""
    info: PromptInfo


def run_prompts(decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig) -> Prefilled:
    """Fills the KV cache with the prompts. Each prompt runs once, for any number of copies."""
    embeds, lengths = prompts.embeds, prompts.lengths
    batch, length, _ = embeds.shape
    mask = prompts.attention_mask & (jnp.arange(length)[None, :] < lengths[:, None])
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    # the last new token is never fed back, so it needs no cache position
    capacity = length + config.max_new_tokens - 1 + config.draft_tokens
    prompt_capacity = capacity if config.copies == 1 else length
    cache = decoder.new_cache(batch, prompt_capacity, embeds.dtype)
    hidden, cache = decoder.extend(
        embeds,
        cache,
        positions=positions,
        attention_mask=mask,
        is_first=True,
        unpacked=prompts.unpacked,
    )
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)
    prompt_ids = _left_padded(prompts.ids, lengths)
    new_ids = jnp.full((batch, config.max_new_tokens), config.pad_id, jnp.int32)
    info = PromptInfo(
        position=count,
        length=lengths.astype(jnp.int32),
        first=jnp.maximum(prompt_ids.shape[1] - lengths, 0).astype(jnp.int32),
        limit=_limits(prompts.limits, batch, config),
    )
    ids = jnp.concatenate([prompt_ids, new_ids], axis=1)
    if config.copies > 1:
        cache = cache.repeated(config.copies, capacity)
        hidden, ids, info = jax.tree.map(
            lambda x: jnp.repeat(x, config.copies, axis=0), (hidden, ids, info)
        )
    return Prefilled(hidden=hidden, cache=cache, ids=ids, info=info)


def run_token(
    decoder: CachedDecoder,
    cache: DecodingCache,
    token: Int[Array, " R"],
    position: Int[Array, " R"],
    attention_mask: Bool[Array, " R"],
    dtype: DTypeLike,
) -> CachedOutput:
    """Runs one token of every sequence."""
    embedded = decoder.embed(token[:, None]).astype(dtype)
    return decoder.extend(
        embedded, cache, positions=position[:, None], attention_mask=attention_mask[:, None]
    )


def process_scores(
    scores: Float[Array, "R V"],
    ids: Int[Array, "R P"],
    generated: Int[Array, ""],
    info: PromptInfo,
    config: DecodingConfig,
) -> Float[Array, "R V"]:
    """Applies all processors to the scores of the next token, in fp32.

    `generated` is the number of tokens generated so far.
    """
    history = History(
        ids=ids,
        first=info.first,
        end=ids.shape[1] - config.max_new_tokens + generated,
        generated=generated,
        prompt_length=info.length,
        limit=info.limit,
    )
    return process(scores, history, config.processors)


def choose_token(
    scores: Float[Array, " V"],
    ids: Int[Array, " P"],
    generated: Int[Array, ""],
    info: PromptInfo,
    rng: Key[Array, ""] | None,
    config: DecodingConfig,
) -> Int[Array, ""]:
    """Chooses the next token of one sequence, after `generated` tokens of its response."""
    one = jax.tree.map(lambda x: x[None], info)
    changed = process_scores(scores[None], ids[None], generated, one, config)[0]
    if rng is None:
        token = jnp.argmax(changed, axis=-1)
    else:
        token = jax.random.categorical(jax.random.fold_in(rng, generated), changed)
    return token.astype(jnp.int32)


def token_rngs(rngs: Key[Array, " R"] | None, index: Int[Array, ""]) -> Key[Array, " R"]:
    """Derives the random keys of new token number `index`. Raises ValueError without `rngs`."""
    if rngs is None:
        raise ValueError("do_sample=True needs random keys: rngs, one per sequence")
    return jax.vmap(lambda rng: jax.random.fold_in(rng, index))(rngs)


def copied_rngs(rngs: Key[Array, " B"] | None, copies: int) -> Key[Array, " R"] | None:
    """Derives a random key for each of several responses; the first keeps the prompt's own key."""
    if rngs is None or copies == 1:
        return rngs

    def of_prompt(rng: Key[Array, ""]) -> Key[Array, " copies"]:
        salted = jax.random.fold_in(rng, COPIES_SALT)
        others = jax.vmap(lambda n: jax.random.fold_in(salted, n))(jnp.arange(1, copies))
        return jnp.concatenate([rng[None], others])

    return jax.vmap(of_prompt)(rngs).reshape(-1)


def _limits(
    limits: Int[Array, " B"] | None, batch: int, config: DecodingConfig
) -> Int[Array, " B"]:
    if limits is None:
        return jnp.full(batch, config.max_new_tokens, jnp.int32)
    return limits.astype(jnp.int32)


def _left_padded(ids: Int[Array, "B T"] | None, lengths: Int[Array, " B"]) -> Int[Array, "B P"]:
    """Moves the padding from the right to the left; [B, 0] if the ids are unknown."""
    if ids is None:
        return jnp.zeros((len(lengths), 0), jnp.int32)
    source = jnp.arange(ids.shape[1])[None] - (ids.shape[1] - lengths[:, None])
    return jnp.take_along_axis(ids.astype(jnp.int32), jnp.maximum(source, 0), axis=1)
