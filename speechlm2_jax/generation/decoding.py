"""What every way of answering shares: its configuration, the prompt's memory, one further step."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.processors import History, Processor, process
from speechlm2_jax.layers.cache import CachedOutput, KVCache

STATIC = {"static": True}
COPIES_SALT = 2**31 - 1
"""Sets the keys of further answers to a prompt apart from those of its steps."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """Beam search, as Hugging Face's `_beam_search` means it."""

    count: int = field(metadata=STATIC)
    length_penalty: Any = 1.0
    """A finished answer's score is its log-probability over its length to this power."""
    early_stopping: bool | Literal["never"] = field(default=False, metadata=STATIC)
    """True: a row ends with its `count`-th finished answer; False: when the best beam, at its
    present length, no longer beats the worst of them; "never": when it cannot at any length."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to answer. A pytree: numbers may be arguments of a program, what is static is part of it.

    With numbers of Python alone it can be hashed, and be a static argument itself.
    """

    max_new_tokens: int = field(metadata=STATIC)
    """Room for the answer; a row may be given a smaller limit."""
    stop_ids: tuple[Any, ...]
    """A row ends with the first of these, which is part of its answer."""
    pad_id: Any
    """What fills a row after its end."""
    processors: tuple[Processor, ...] = ()
    """What happens to the scores before a token is chosen, in this order."""
    do_sample: bool = field(default=False, metadata=STATIC)
    """Draw the next token; otherwise take the likeliest."""
    answers: int = field(default=1, metadata=STATIC)
    """Answers to each prompt, one after the other in the rows that come back."""
    beams: BeamConfig | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")

    @property
    def copies(self) -> int:
        """Rows that are computed for each prompt."""
        return self.answers if self.beams is None else self.beams.count


@runtime_checkable
class CachedDecoder(Protocol):
    """A language model that can be run step by step."""

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up."""
        ...

    def new_cache(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        """Makes an empty memory."""
        ...

    def extend(
        self,
        embeds: Float[Array, "B T D"],
        cache: KVCache,
        *,
        positions: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
    ) -> CachedOutput:
        """Runs further steps."""
        ...

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores every token."""
        ...


class Prompts(NamedTuple):
    """Prompts [B, T], padded on the right."""

    embeds: Float[Array, "B T D"]
    lengths: Int[Array, " B"]
    """Steps of each; a row of length 0 has ended from the start."""
    attention_mask: Bool[Array, "B T"]
    """False beyond the lengths and wherever a prompt has a step that others may not see."""
    limits: Int[Array, " B"] | None = None
    """Tokens that each answer may have; as many as there is room for without."""
    ids: Int[Array, "B T"] | None = None
    """Their tokens, where processors are to see them."""
    rngs: Key[Array, " B"] | None = None
    """One random key per row, for what is drawn."""


class Rows(NamedTuple):
    """What stays of the prompts while R rows are answered."""

    place: Int[Array, " R"]
    """Position of the first new token: positions count the keys, as in Hugging Face."""
    steps: Int[Array, " R"]
    first: Int[Array, " R"]
    limit: Int[Array, " R"]


class Prefilled(NamedTuple):
    """The prompts in memory: `copies` rows for each, one after the other."""

    hidden: Float[Array, "R 1 D"]
    """The state at each prompt's last step."""
    cache: KVCache
    ids: Int[Array, "R H"]
    """The prompt's ids, if known, on the right of their slots; then the room for the answer."""
    rows: Rows


def run_prompts(decoder: CachedDecoder, prompts: Prompts, config: DecodingConfig) -> Prefilled:
    """Runs the prompts once, whatever the number of copies."""
    embeds, lengths = prompts.embeds, prompts.lengths
    batch, steps, _ = embeds.shape
    visible = prompts.attention_mask & (jnp.arange(steps)[None, :] < lengths[:, None])
    count = jnp.sum(visible, axis=1, dtype=jnp.int32)
    positions = jnp.where(visible, jnp.cumsum(visible, axis=1, dtype=jnp.int32) - 1, 0)
    # The last token is never fed back, so it needs no slot.
    capacity = steps + config.max_new_tokens - 1
    own = capacity if config.copies == 1 else steps
    cache = decoder.new_cache(batch, own, embeds.dtype)
    hidden, cache = decoder.extend(embeds, cache, positions=positions, attention_mask=visible)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)
    known = _right_aligned(prompts.ids, lengths)
    room = jnp.full((batch, config.max_new_tokens), config.pad_id, jnp.int32)
    rows = Rows(
        place=count,
        steps=lengths.astype(jnp.int32),
        first=jnp.maximum(known.shape[1] - lengths, 0).astype(jnp.int32),
        limit=_limits(prompts.limits, batch, config),
    )
    ids = jnp.concatenate([known, room], axis=1)
    if config.copies > 1:
        cache = cache.repeated(config.copies, capacity)
        hidden, ids, rows = jax.tree.map(
            lambda x: jnp.repeat(x, config.copies, axis=0), (hidden, ids, rows)
        )
    return Prefilled(hidden=hidden, cache=cache, ids=ids, rows=rows)


def run_token(
    decoder: CachedDecoder,
    cache: KVCache,
    token: Int[Array, " R"],
    place: Int[Array, " R"],
    attention_mask: Bool[Array, " R"],
    dtype: Any,
) -> CachedOutput:
    """Runs one token of every row."""
    embedded = decoder.embed(token[:, None]).astype(dtype)
    return decoder.extend(
        embedded, cache, positions=place[:, None], attention_mask=attention_mask[:, None]
    )


def process_scores(
    scores: Float[Array, "R V"],
    ids: Int[Array, "R H"],
    step: Int[Array, ""],
    rows: Rows,
    config: DecodingConfig,
) -> Float[Array, "R V"]:
    """The scores of token `step` of the answers after all processors, in fp32."""
    history = History(
        ids=ids,
        first=rows.first,
        position=ids.shape[1] - config.max_new_tokens + step,
        step=step,
        prompt_steps=rows.steps,
        limit=rows.limit,
    )
    return process(scores, history, config.processors)


def step_rngs(rngs: Key[Array, " R"] | None, step: Int[Array, ""]) -> Key[Array, " R"]:
    """A row's keys of one step. Raises ValueError if there are none."""
    if rngs is None:
        raise ValueError("do_sample=True needs random keys, one per row")
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(rngs)


def copied_rngs(rngs: Key[Array, " B"] | None, copies: int) -> Key[Array, " R"] | None:
    """Keys of several answers to each prompt; the first one's is that of an only answer."""
    if rngs is None or copies == 1:
        return rngs

    def of_row(key: Key[Array, ""]) -> Key[Array, " N"]:
        salted = jax.random.fold_in(key, COPIES_SALT)
        others = jax.vmap(lambda n: jax.random.fold_in(salted, n))(jnp.arange(1, copies))
        return jnp.concatenate([key[None], others])

    return jax.vmap(of_row)(rngs).reshape(-1)


def _limits(
    limits: Int[Array, " B"] | None, batch: int, config: DecodingConfig
) -> Int[Array, " B"]:
    if limits is None:
        return jnp.full(batch, config.max_new_tokens, jnp.int32)
    return limits.astype(jnp.int32)


def _right_aligned(ids: Int[Array, "B T"] | None, lengths: Int[Array, " B"]) -> Int[Array, "B P"]:
    """Rows that were padded on the right, padded on the left; no column where ids are unknown."""
    if ids is None:
        return jnp.zeros((len(lengths), 0), jnp.int32)
    source = jnp.arange(ids.shape[1])[None] - (ids.shape[1] - lengths[:, None])
    return jnp.take_along_axis(ids.astype(jnp.int32), jnp.maximum(source, 0), axis=1)
