"""Where the draft tokens of speculative decoding come from.

A drafter proposes the tokens that may come next. Proposals change the speed, never the response.

- `LookupDrafter` copies what followed the same n-gram earlier, in prompt or response.
- `TextDrafter` has a whole text, such as the transcript of an ASR model, and resumes it after a
  rejected token at the place that aligns with the response.
- `draft_llm.LlmDrafter` asks a smaller LLM.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.slot_rows import put_rows
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain

S = TypeVar("S")

STATIC = {"static": True}
WORD, MARK, OTHER_START = 10.0, 1.0, 5.0
"""Costs of an alignment: to leave out or replace a token with letters, to leave out or replace one
without, and to replace the start of a word by its middle."""
BEYOND = 1e9
"""Cost of what lies beyond the end of a draft."""
START, LETTERS = 1, 2
"""A token class is LETTERS * (id of its letters, 0 without any) + START if a word starts there."""


class DraftText(NamedTuple):
    """What a drafter copies from: ids padded on the right, one sequence per prompt."""

    ids: Int[Array, "*B S"] | Int[np.ndarray, "*B S"]
    lengths: Int[Array, "*B"] | Int[np.ndarray, "*B"]

    def by_sequence(self) -> "DraftText":
        """Joins the leading axes: [G, R, S] -> [G * R, S]."""
        ids, lengths = jnp.asarray(self.ids), jnp.asarray(self.lengths)
        return DraftText(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1))


class Proposal(NamedTuple):
    """The tokens that may come next, padded on the right."""

    ids: Int[Array, "R K"]
    lengths: Int[Array, " R"]


class Known(NamedTuple):
    """What a drafter is told of the responses so far."""

    ids: Int[Array, "R A"]
    lengths: Int[Array, " R"]
    choose: Callable[[Float[Array, "R V"], Int[Array, "R K"], Int[Array, ""]], Int[Array, " R"]]
    """(scores, draft tokens, how many of them there are) -> the token that follows them, chosen as
    the tokens of the response are: with its processors and, for sampling, the same random keys."""


class DraftState(Protocol):
    """What a drafter keeps of every sequence. A pytree."""

    def admit(self: S, new: S, at: Int[Array, "G P"]) -> S:
        """Puts the states of new sequences into slots; see `put_rows`."""
        ...

    def constrained(self: S) -> S:
        """Constrains the sharding of every array."""
        ...


class TextState(NamedTuple):
    """A text to copy from, and how its beginnings align with the response so far."""

    ids: Int[Array, "R S"]
    lengths: Int[Array, " R"]
    costs: Float[Array, "R S1"]
    """Cost of aligning the response with the first 0, 1, ..., S tokens of the text."""

    def admit(self, new: "TextState", at: Int[Array, "G P"]) -> "TextState":
        """Puts the texts of new sequences into slots; see `put_rows`.

        Shorter ones are padded on the left: only those of prompt lookup are ever shorter.
        """
        missing = self.ids.shape[1] - new.ids.shape[1]
        wide = new._replace(ids=jnp.pad(new.ids, ((0, 0), (missing, 0))))
        return jax.tree.map(lambda kept, rows: put_rows(kept, rows, at), self, wide)

    def constrained(self) -> "TextState":
        """Constrains the sharding of every array."""
        return jax.tree.map(lambda x: constrain(x, *("batch", None)[: x.ndim]), self)


@dataclass(frozen=True, kw_only=True)
class Drafter(ABC):
    """A source of draft tokens. A pytree."""

    tokens: int = field(metadata=STATIC)
    """Most draft tokens per pass of the LLM (K)."""

    @abstractmethod
    def start(self, source: Any, new_tokens: int) -> Any:
        """The state (`DraftState`) before the first token of responses of up to `new_tokens`.

        `source` is `Prompts.drafts`.
        """

    @abstractmethod
    def empty(self, sequences: int, width: int, new_tokens: int) -> Any:
        """The state of slots without a sequence, with room for sources of `width` tokens."""

    @abstractmethod
    def propose(self, state: Any, known: Known) -> tuple[Proposal, Any]:
        """Proposes the tokens after the first `known.lengths` ids of each response.

        Returns the new state too.
        """

    def observe(self, state: Any, tokens: Int[Array, "R W"], count: Int[Array, " R"]) -> Any:
        """Takes note of the first `count` of `tokens`, which were added to each response."""
        return state


class _Copier(Drafter):
    """A drafter that copies from a `DraftText`."""

    @abstractmethod
    def start(self, source: DraftText, new_tokens: int) -> TextState:
        """The state before the first token of the response."""

    def empty(self, sequences: int, width: int, new_tokens: int) -> TextState:
        """The state of slots without a sequence."""
        ids = jnp.zeros((sequences, width), jnp.int32)
        return self.start(DraftText(ids, jnp.zeros(sequences, jnp.int32)), new_tokens)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class LookupDrafter(_Copier):
    """Prompt lookup: what followed the first earlier occurrence of the last n tokens.

    Tries n = `ngram`, ..., 1, as transformers' `PromptLookupCandidateGenerator`.
    """

    ngram: int = field(default=2, metadata=STATIC)
    """Longest n-gram (`max_matching_ngram_size`)."""

    def start(self, source: DraftText, new_tokens: int) -> TextState:
        """Keeps the prompt, its padding moved to the left."""
        ids, lengths = jnp.asarray(source.ids, jnp.int32), jnp.asarray(source.lengths, jnp.int32)
        index = jnp.arange(ids.shape[1])[None] - (ids.shape[1] - lengths[:, None])
        ids = jnp.take_along_axis(ids, jnp.maximum(index, 0), axis=1)
        return TextState(ids, lengths, jnp.zeros((len(ids), 0)))

    def propose(self, state: TextState, known: Known) -> tuple[Proposal, TextState]:
        """Looks the last tokens up."""
        prompt = state.ids.shape[1]
        ids = jnp.concatenate([state.ids, known.ids], axis=1)
        first, end = prompt - state.lengths, prompt + known.lengths
        start, found = jnp.zeros_like(end), jnp.zeros(len(end), bool)
        for n in range(self.ngram, 0, -1):
            at, is_there = _first_match(ids, first, end, n)
            start = jnp.where(~found & is_there, at + n, start)
            found |= is_there
        index = start[:, None] + jnp.arange(self.tokens)[None]
        copied = jnp.take_along_axis(ids, jnp.minimum(index, ids.shape[1] - 1), axis=1)
        count = jnp.where(found, jnp.clip(end - start, 0, self.tokens), 0)
        return Proposal(copied, count), state


@register_pytree
@dataclass(frozen=True, kw_only=True)
class TextDrafter(_Copier):
    """Copies a text of each response's own, from the place that aligns best with the response.

    The alignment is the Levenshtein distance of tokens, computed forwards, one row per new token.
    Case, and tokens without letters, cost little or nothing, so that a draft without case and
    punctuation serves a response with both.
    """

    classes: Int[Array, " V"] | Int[np.ndarray, " V"]
    """Token id -> its class: equal classes are the same letters (see `LETTERS`)."""

    def start(self, source: DraftText, new_tokens: int) -> TextState:
        """Aligns the empty response with the beginning of each text."""
        ids, lengths = jnp.asarray(source.ids, jnp.int32), jnp.asarray(source.lengths, jnp.int32)
        return TextState(ids, lengths, self._left_out(ids))

    def propose(self, state: TextState, known: Known) -> tuple[Proposal, TextState]:
        """The text after its best aligned beginning; of equally good ones after the longest."""
        index = jnp.arange(state.costs.shape[1])[None]
        costs = jnp.where(index <= state.lengths[:, None], state.costs, BEYOND)
        start = costs.shape[1] - 1 - jnp.argmin(costs[:, ::-1], axis=1)
        index = start[:, None] + jnp.arange(self.tokens)[None]
        copied = jnp.take_along_axis(state.ids, jnp.minimum(index, state.ids.shape[1] - 1), axis=1)
        count = jnp.clip(state.lengths - start, 0, self.tokens).astype(jnp.int32)
        return Proposal(copied, count), state

    def observe(
        self, state: TextState, tokens: Int[Array, "R W"], count: Int[Array, " R"]
    ) -> TextState:
        """Adds a row to the distances for each new token."""
        total = self._left_out(state.ids)

        def add(index: Array, costs: Array) -> Array:
            following = self._next(costs, total, state.ids, tokens[:, index])
            return jnp.where((index < count)[:, None], following, costs)

        costs = jax.lax.fori_loop(0, jnp.max(count), add, state.costs)
        return state._replace(costs=costs)

    def _left_out(self, ids: Int[Array, "R S"]) -> Float[Array, "R S1"]:
        """Cost of leaving out the first 0, 1, ..., S tokens of each text."""
        each = _cost(jnp.asarray(self.classes)[ids] // LETTERS > 0)
        return jnp.pad(jnp.cumsum(each, axis=1), ((0, 0), (1, 0)))

    def _next(
        self,
        costs: Float[Array, "R S1"],
        total: Float[Array, "R S1"],
        ids: Int[Array, "R S"],
        token: Int[Array, " R"],
    ) -> Float[Array, "R S1"]:
        classes = jnp.asarray(self.classes)
        draft, own = classes[ids], classes[token][:, None]
        is_word, is_own_word = draft // LETTERS > 0, own // LETTERS > 0
        unlike = jnp.where(is_word & is_own_word, WORD, _cost(is_word) + _cost(is_own_word))
        unlike = jnp.where(~is_word & ~is_own_word, MARK, unlike)
        unlike += jnp.where((draft ^ own) & START, OTHER_START, 0.0)
        is_same = (ids == token[:, None]) | (is_word & (draft // LETTERS == own // LETTERS))
        replaced = costs[:, :-1] + jnp.where(is_same, 0.0, unlike)
        added = costs + _cost(is_own_word)
        best = jnp.minimum(added, jnp.pad(replaced, ((0, 0), (1, 0)), constant_values=BEYOND))
        # a beginning may end with tokens that are left out: min over k <= j of best[k] + those
        return total + jax.lax.cummin(best - total, axis=1)


def _cost(is_word: Bool[Array, "*any"]) -> Float[Array, "*any"]:
    return jnp.where(is_word, WORD, MARK)


def _first_match(
    known: Int[Array, "R S"], first: Int[Array, " R"], end: Int[Array, " R"], n: int
) -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
    """Where the last n tokens before `end` first occur with a token after them; whether they do."""
    windows = known.shape[1] - n + 1
    if windows < 1:
        return jnp.zeros_like(end), jnp.zeros(len(end), bool)
    at = jnp.arange(windows)[None]
    matches = (at >= first[:, None]) & (at + n < end[:, None])
    matches &= (end - first >= n)[:, None]
    for i in range(n):
        last = jnp.take_along_axis(known, jnp.maximum(end - n + i, 0)[:, None], axis=1)
        matches &= known[:, i : i + windows] == last
    return jnp.argmax(matches, axis=1).astype(end.dtype), jnp.any(matches, axis=1)
