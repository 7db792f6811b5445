"""Logits processors with the semantics of Hugging Face's GenerationConfig.

A processor is a pytree. Its numbers may be traced, so one compiled program serves all values. Its
call is a pure function of the scores and of the tokens so far. `inference.request.processors` makes
processors from generation options, in the order of transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.generation import warpers
from speechlm2_jax.generation.warpers import Number
from speechlm2_jax.pytrees import register_pytree

Scores = Float[Array, "B V"]
WITHOUT_LOOPS_N = 4
"""The n-grams that do not occur twice in a text that is generated again because of a loop."""
WILDCARD = -1
"""In a prefix: any token, or none."""
Numbers = Array | np.ndarray | Sequence[Number]
"""Some of them: ids or scores."""
T = TypeVar("T", bound=type)


class History(NamedTuple):
    """The tokens of each sequence when the next one is chosen."""

    ids: Int[Array, "B P"]
    """Prompt ids (if processors read them, padded on the left), then the generated ids."""
    first: Int[Array, " B"]
    """Index in `ids` of the first token of each sequence."""
    end: Int[Array, ""]
    """Index in `ids` after the last token: the next token is written there."""
    generated: Int[Array, ""]
    """Number of tokens generated so far."""
    prompt_length: Int[Array, " B"]
    """Positions of the prompt, audio frames included, whether or not `ids` holds its ids."""
    limit: Int[Array, " B"]
    """Largest number of generated tokens."""

    def contains(self, vocabulary: int) -> Bool[Array, "B V"]:
        """True for the tokens that each sequence contains."""
        index = jnp.arange(self.ids.shape[1])
        is_token = (index[None] >= self.first[:, None]) & (index < self.end)[None]
        return mark(self.ids, is_token, vocabulary)

    def last_tokens(self, length: int) -> Int[Array, "B L"]:
        """The last tokens of each sequence; -1 before its first."""
        index = self.end - length + jnp.arange(length)
        ids = jnp.take(self.ids, jnp.maximum(index, 0), axis=1)
        return jnp.where(index[None] >= self.first[:, None], ids, -1)


class Processor(ABC):
    """Changes the scores of the next token. A pytree."""

    READS_PROMPT: ClassVar[bool] = False
    """Whether it reads the ids of the prompt."""

    def __call__(self, scores: Scores, history: History) -> Scores:
        """Returns the changed scores, in fp32."""
        return self._changed(scores, history)

    @abstractmethod
    def _changed(self, scores: Scores, history: History) -> Scores: ...


def process(scores: Scores, history: History, processors: tuple[Processor, ...]) -> Scores:
    """Applies processors in order, in fp32."""
    scores = scores.astype(jnp.float32)
    for processor in processors:
        scores = processor(scores, history)
    return scores


def reads_prompt(processors: tuple[Processor, ...]) -> bool:
    """Whether any processor reads the ids of the prompt."""
    return any(processor.READS_PROMPT for processor in processors)


def mark(
    ids: Int[Array, "B T"], is_marked: Bool[Array, "B T"], vocabulary: int
) -> Bool[Array, "B V"]:
    """Per sequence, True at the marked ids; ids outside the vocabulary are dropped."""
    sequence = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocabulary), bool).at[sequence, ids].max(is_marked, mode="drop")


def static(**options: Any) -> Any:
    """A field of a processor that is static in compiled programs."""
    return field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def processor(cls: T) -> T:
    """Makes a class a frozen dataclass and a pytree."""
    return register_pytree(dataclass(frozen=True)(cls))


@processor
class SequenceBias(Processor):
    """Adds a bias to tokens that would complete a sequence: `sequence_bias`, `bad_words_ids`.

    Sequence n is `prefixes[n]`, padded with WILDCARD on the left, followed by the token `last[n]`.
    """

    prefixes: Numbers
    last: Numbers
    bias: Numbers
    READS_PROMPT: ClassVar[bool] = True

    def _changed(self, scores: Scores, history: History) -> Scores:
        prefixes = jnp.asarray(self.prefixes, jnp.int32)[None]
        recent = history.last_tokens(prefixes.shape[-1])[:, None]
        completes = jnp.all((prefixes == WILDCARD) | (prefixes == recent), axis=-1)  # [B, n]
        bias = jnp.where(completes, jnp.asarray(self.bias, jnp.float32)[None], 0.0)
        return scores + jnp.zeros_like(scores).at[:, jnp.asarray(self.last)].add(bias)


@processor
class RepetitionPenalty(Processor):
    """Lowers the scores of tokens that the sequence contains: `repetition_penalty` (CTRL).

    Positive scores are divided by the penalty, negative ones multiplied.
    """

    penalty: Number
    READS_PROMPT: ClassVar[bool] = True

    def _changed(self, scores: Scores, history: History) -> Scores:
        punished = jnp.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return jnp.where(history.contains(scores.shape[-1]), punished, scores)


@processor
class NoRepeatNgrams(Processor):
    """Forbids tokens that would repeat an n-gram of the sequence: `no_repeat_ngram_size`."""

    n: int = static()
    READS_PROMPT: ClassVar[bool] = True

    def _changed(self, scores: Scores, history: History) -> Scores:
        windows = history.ids.shape[1] - self.n + 1
        if windows < 1:
            return scores
        start = jnp.arange(windows)
        is_repeated = start[None] >= history.first[:, None]
        is_repeated &= (start + self.n - 1 < history.end)[None]
        recent = history.last_tokens(self.n - 1)
        for i in range(self.n - 1):
            is_repeated &= history.ids[:, i : i + windows] == recent[:, i : i + 1]
        banned = mark(history.ids[:, self.n - 1 :], is_repeated, scores.shape[-1])
        return jnp.where(banned, -jnp.inf, scores)


@processor
class MinLength(Processor):
    """Forbids end tokens while prompt and response are shorter than `least`: `min_length`."""

    least: Number
    stop_ids: Numbers

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_short = history.prompt_length + history.generated < self.least
        return jnp.where(is_short[:, None] & _among(self.stop_ids, scores), -jnp.inf, scores)


@processor
class MinNewTokens(Processor):
    """Forbids end tokens while the response is shorter than `least`: `min_new_tokens`."""

    least: Number
    stop_ids: Numbers

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_short = history.generated < self.least
        return jnp.where(is_short & _among(self.stop_ids, scores), -jnp.inf, scores)


@processor
class ForcedFirst(Processor):
    """Forces the first token of the response: `forced_bos_token_id`."""

    token: Number

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jnp.where(history.generated == 0, _only((self.token,), scores), scores)


@processor
class ForcedEnd(Processor):
    """Forces an end token as the last token within the limit: `forced_eos_token_id`."""

    tokens: Numbers

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_last = history.generated == history.limit - 1
        return jnp.where(is_last[:, None], _only(self.tokens, scores), scores)


@processor
class FiniteScores(Processor):
    """Replaces NaN by 0 and infinities by the largest finite numbers: `remove_invalid_values`."""

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jnp.nan_to_num(scores, nan=0.0)


@processor
class DecayingLength(Processor):
    """Raises the scores of end tokens exponentially after `start` tokens of the response.

    `exponential_decay_length_penalty` = (start, factor).
    """

    start: Number
    factor: Number
    stop_ids: Numbers

    def _changed(self, scores: Scores, history: History) -> Scores:
        beyond = jnp.maximum(history.generated - self.start, 0)
        gain = jnp.abs(scores) * (jnp.power(jnp.float32(self.factor), beyond) - 1.0)
        is_raised = _among(self.stop_ids, scores) & jnp.isfinite(scores)
        return scores + jnp.where(is_raised, gain, 0.0)


@processor
class Suppress(Processor):
    """Forbids these tokens: `suppress_tokens`."""

    tokens: Numbers

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jnp.where(_among(self.tokens, scores), -jnp.inf, scores)


@processor
class SuppressAt(Processor):
    """Forbids these tokens at one index of the response: `begin_suppress_tokens`."""

    tokens: Numbers
    index: Number

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_here = history.generated == self.index
        return jnp.where(is_here & _among(self.tokens, scores), -jnp.inf, scores)


@processor
class Temperature(Processor):
    """Divides the scores by the temperature: `temperature`."""

    value: Number

    def _changed(self, scores: Scores, history: History) -> Scores:
        return scores / self.value


@processor
class TopK(Processor):
    """Keeps the k highest scores: `top_k`. k is static."""

    k: int = static()

    def _changed(self, scores: Scores, history: History) -> Scores:
        return warpers.keep_top_k(scores, self.k)


@processor
class Keep(Processor):
    """Truncates the distribution by a rule of `warpers`, for example `keep_top_p`."""

    rule: Callable[..., Scores] = static()
    value: Number
    least: int = static(default=1)
    """Smallest number of tokens to keep."""

    def _changed(self, scores: Scores, history: History) -> Scores:
        return self.rule(scores, self.value, self.least)


@processor
class Renormalize(Processor):
    """Turns the scores into log-probabilities: `renormalize_logits`."""

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jax.nn.log_softmax(scores, axis=-1)


def _among(ids: Numbers, scores: Scores) -> Bool[Array, "1 V"]:
    """True at these ids of the vocabulary.

    By comparison, because a scatter into so few booleans sometimes lost updates on CPUs.
    """
    vocabulary = jnp.arange(scores.shape[-1])
    return jnp.any(vocabulary[None] == jnp.asarray(ids, jnp.int32)[:, None], axis=0)[None]


def _only(ids: Numbers, scores: Scores) -> Float[Array, "1 V"]:
    """Scores that allow only these ids."""
    return jnp.where(_among(ids, scores), 0.0, -jnp.inf)
