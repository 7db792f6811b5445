"""A smaller LLM as the source of draft tokens, with a KV cache of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.generation.drafts import STATIC, Drafter, Known, Proposal
from speechlm2_jax.layers.cache import DraftCache
from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.layers.unstacked import merge_layers
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain

IMPOSSIBLE = -1e9
"""Score of a token that the draft LLM does not have."""


class DraftPrompts(NamedTuple):
    """The prompts as the draft LLM reads them, padded on the right."""

    embeds: Float[Array, "B T D"]
    attention_mask: Bool[Array, "*B T"]

    def by_sequence(self) -> "DraftPrompts":
        """Joins the leading axes of the mask: [G, R, T] -> [G * R, T]."""
        mask = jnp.asarray(self.attention_mask)
        return DraftPrompts(self.embeds, mask.reshape(-1, mask.shape[-1]))


class LlmState(NamedTuple):
    """The draft LLM's cache: prompt, one empty position, response."""

    cache: Any
    """A `DraftCache`."""
    first: Int[Array, " R"]
    """Cache position of the first token of the response."""
    position: Int[Array, " R"]
    """Position of this token in its own sequence."""

    def after(self, tokens: Int[Array, " R"]) -> DraftCache:
        """The cache with the first `tokens` of the response only."""
        return self.cache.keep(self.first + tokens, self.position + tokens)

    def admit(self, new: "LlmState", at: Int[Array, "G P"]) -> "LlmState":
        """Puts the caches of new sequences into slots; see `put_rows`."""
        return LlmState(
            cache=self.cache.admit(at, new.cache),
            first=put_rows(self.first, new.first, at),
            position=put_rows(self.position, new.position, at),
        )

    def constrained(self) -> "LlmState":
        """Constrains the sharding of every array."""
        first, position = (constrain(x, "batch") for x in (self.first, self.position))
        return LlmState(self.cache.constrained(), first, position)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class LlmDrafter(Drafter):
    """Proposes what a smaller LLM would generate: `tokens` of them, one after the other.

    Its vocabulary is that of the model, but for tokens that only one of them has at its end.
    """

    variables: Mapping[str, Any]
    """Of the LLM, as `merge_layers` takes them."""
    graphdef: nnx.GraphDef[Decoder] = field(metadata=STATIC)
    vocabulary: int = field(metadata=STATIC)
    """Number of tokens of the model."""
    dtype: str = field(metadata=STATIC)
    """Of the draft LLM's activations."""

    def start(self, source: DraftPrompts, new_tokens: int) -> LlmState:
        """Runs the prompts."""
        decoder, embeds, mask = self._decoder(), *source
        batch, length, _ = embeds.shape
        count = jnp.sum(mask, axis=1, dtype=jnp.int32)
        cache = decoder.new_cache(batch, length + new_tokens + self.tokens, embeds.dtype)
        _, cache = decoder.extend(
            embeds,
            cache,
            positions=jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0),
            attention_mask=mask,
            is_first=True,
        )
        return self._state(cache, length, count)

    def empty(self, sequences: int, width: int, new_tokens: int) -> LlmState:
        """The state of slots without a sequence, with room for prompts of `width` tokens."""
        capacity = width + new_tokens + self.tokens
        cache = self._decoder().new_cache(sequences, capacity, jnp.dtype(self.dtype))
        return self._state(cache, width, jnp.zeros(sequences, jnp.int32))

    def propose(self, state: LlmState, known: Known) -> tuple[Proposal, LlmState]:
        """Generates the next tokens.

        The last draft of the pass before has not been run. If it was accepted, it is the token
        before the latest one. So the first run has two tokens, whether the first of them is needed
        or not.
        """
        decoder, dtype = self._decoder(), state.cache.dtype
        index = known.lengths[:, None] + jnp.arange(-2, 0)[None]
        pair = jnp.take_along_axis(known.ids, jnp.maximum(index, 0), axis=1)

        def run(cache: DraftCache, ids: Array, index: Array) -> tuple[Array, DraftCache]:
            hidden, extended = decoder.extend(
                decoder.embed(ids).astype(dtype),
                cache,
                positions=state.position[:, None] + index,
                attention_mask=index >= 0,
            )
            assert isinstance(extended, DraftCache)
            return self._fitting(decoder.logits(hidden[:, -1:])[:, 0]), extended

        def propose_next(number: Array, carry: tuple[Array, DraftCache]) -> Any:
            ids, cache = carry
            token = jax.lax.dynamic_slice_in_dim(ids, number - 1, 1, axis=1)
            cache = state._replace(cache=cache).after(known.lengths + number - 1)
            scores, cache = run(cache, token, known.lengths[:, None] + number - 1)
            return with_next(scores, ids, number), cache

        def with_next(scores: Array, ids: Array, number: Array) -> Array:
            token = known.choose(scores, ids, number)
            return jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], number, axis=1)

        scores, cache = run(state.after(known.lengths - 2), pair, index)
        ids = jnp.zeros((len(pair), self.tokens), jnp.int32)
        carry = with_next(scores, ids, jnp.int32(0)), cache
        ids, cache = jax.lax.fori_loop(1, self.tokens, propose_next, carry)
        count = jnp.full(len(pair), self.tokens, jnp.int32)
        return Proposal(ids, count), state._replace(cache=cache)

    def _decoder(self) -> Decoder:
        return merge_layers(self.graphdef, self.variables)

    def _state(self, cache: Any, length: int, position: Int[Array, " R"]) -> LlmState:
        # in the first pass there is no token before the latest one: an empty position takes it
        ready = DraftCache.after_prompts(cache, length + 1, position, self.tokens + 1)
        return LlmState(ready, jnp.full_like(position, length + 1), position)

    def _fitting(self, scores: Float[Array, "R W"]) -> Float[Array, "R V"]:
        """Scores of the tokens that the model has."""
        missing = max(self.vocabulary - scores.shape[1], 0)
        own = scores[:, : self.vocabulary]
        return jnp.pad(own, ((0, 0), (0, missing)), constant_values=IMPOSSIBLE)
