"""Answering: prompts as embeddings in, token ids out, in one compiled loop."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.generation.sampling import SamplingConfig, choose
from speechlm2_jax.layers.cache import Extended, KVCache


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How to answer; static, so each value is a program of its own."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """A row ends with the first of these, which is part of its answer."""
    pad_id: int
    """What fills a row after its end."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")


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
        is_key: Bool[Array, "B T"],
    ) -> Extended:
        """Runs further steps."""
        ...

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores every token."""
        ...


class _Answering(NamedTuple):
    """State of the loop."""

    step: Array
    """Int32 scalar: tokens chosen so far, per row."""
    ids: Int[Array, "B A"]
    token: Int[Array, " B"]
    finished: Bool[Array, " B"]
    cache: KVCache


def decode(
    decoder: CachedDecoder,
    embeds: Float[Array, "B T D"],
    *,
    lengths: Int[Array, " B"],
    is_key: Bool[Array, "B T"],
    config: DecodingConfig,
    keys: Key[Array, " B"] | None = None,
) -> Int[Array, "B A"]:
    """Answers prompts that are padded on the right; A = `config.max_new_tokens` ids per row.

    `lengths` are the prompts' steps; `is_key` is False beyond them and wherever a prompt has a
    step that others may not see. Positions count the keys, as in Hugging Face's `generate`. A row
    that has ended is filled with the pad id, and the loop stops when all have; a row of length 0
    has ended from the start. With sampling, `keys` holds one random key per row. Pure; one
    program per shape and config.
    """
    rows, steps, _ = embeds.shape
    visible = is_key & (jnp.arange(steps)[None, :] < lengths[:, None])
    count = jnp.sum(visible, axis=1, dtype=jnp.int32)
    positions = jnp.where(visible, jnp.cumsum(visible, axis=1, dtype=jnp.int32) - 1, 0)

    def pick(hidden: Float[Array, "B 1 D"], step: Array | int) -> Int[Array, " B"]:
        drawn = None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        return choose(decoder.logits(hidden)[:, 0], config.sampling, drawn)

    def record(state: _Answering, token: Int[Array, " B"]) -> _Answering:
        token = jnp.where(state.finished, config.pad_id, token).astype(jnp.int32)
        stops = jnp.asarray(config.stop_ids, jnp.int32)
        return state._replace(
            step=state.step + 1,
            ids=jax.lax.dynamic_update_slice(state.ids, token[:, None], (0, state.step)),
            token=token,
            finished=state.finished | jnp.isin(token, stops),
        )

    def unfinished(state: _Answering) -> Array:
        return (state.step < config.max_new_tokens) & ~jnp.all(state.finished)

    def advance(state: _Answering) -> _Answering:
        embedded = decoder.embed(state.token[:, None]).astype(embeds.dtype)
        place = (count + state.step - 1)[:, None]
        hidden, cache = decoder.extend(
            embedded, state.cache, positions=place, is_key=~state.finished[:, None]
        )
        return record(state._replace(cache=cache), pick(hidden, state.step))

    # The last token is never fed back, so it needs no slot.
    cache = decoder.new_cache(rows, steps + config.max_new_tokens - 1, embeds.dtype)
    hidden, cache = decoder.extend(embeds, cache, positions=positions, is_key=visible)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    start = _Answering(
        step=jnp.zeros((), jnp.int32),
        ids=jnp.full((rows, config.max_new_tokens), config.pad_id, jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        finished=lengths == 0,
        cache=cache,
    )
    first = record(start, pick(jnp.take_along_axis(hidden, last, axis=1), 0))
    return jax.lax.while_loop(unfinished, advance, first).ids
