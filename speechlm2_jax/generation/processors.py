"""Changes to the scores of the next token, as Hugging Face's GenerationConfig means them.

A processor is a value: a pytree whose numbers may be traced, so that one program serves all of
them, and whose call is a pure function of the scores and of what each row has said. Their order
is that of `models.generation_config`, which is transformers'.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.generation import warpers

Scores = Float[Array, "B V"]
WILDCARD = -1
"""In a prefix: any token, or none."""
T = TypeVar("T", bound=type)


class History(NamedTuple):
    """What the rows have said when the next token is chosen, in slots in order of time."""

    ids: Int[Array, "B H"]
    """The prompt, on the right of its slots, if processors may see it; then the answer."""
    first: Int[Array, " B"]
    """The first slot that holds a token of the row."""
    position: Int[Array, ""]
    """Where the next token goes."""
    step: Int[Array, ""]
    """Tokens of the answer so far."""
    prompt_steps: Int[Array, " B"]
    """Steps of the prompt, frames of audio included, whether or not its ids are here."""
    limit: Int[Array, " B"]
    """Tokens that the answer may have."""

    def seen(self, vocabulary: int) -> Bool[Array, "B V"]:
        """Which tokens a row holds already."""
        positions = jnp.arange(self.ids.shape[1])
        is_held = (positions[None] >= self.first[:, None]) & (positions < self.position)[None]
        return mark(self.ids, is_held, vocabulary)

    def ending(self, length: int) -> Int[Array, "B L"]:
        """The last tokens of each row; -1 before its first."""
        positions = self.position - length + jnp.arange(length)
        ids = jnp.take(self.ids, jnp.maximum(positions, 0), axis=1)
        return jnp.where(positions[None] >= self.first[:, None], ids, -1)


class Processor(ABC):
    """Something that changes the scores of the next token; a pytree, and pure."""

    READS_PROMPT: ClassVar[bool] = False
    """Whether it looks at the ids of the prompt."""

    def __call__(self, scores: Scores, history: History) -> Scores:
        """Gives the changed scores, in fp32."""
        return self._changed(scores, history)

    @abstractmethod
    def _changed(self, scores: Scores, history: History) -> Scores: ...


def process(scores: Scores, history: History, processors: tuple[Processor, ...]) -> Scores:
    """Runs processors one after the other, in fp32."""
    scores = scores.astype(jnp.float32)
    for processor in processors:
        scores = processor(scores, history)
    return scores


def reads_prompt(processors: tuple[Processor, ...]) -> bool:
    """Whether any of them looks at the ids of the prompt."""
    return any(processor.READS_PROMPT for processor in processors)


def mark(
    ids: Int[Array, "B N"], is_marked: Bool[Array, "B N"], vocabulary: int
) -> Bool[Array, "B V"]:
    """Per row, True at the ids that are marked; ids beyond the vocabulary are left out."""
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocabulary), bool).at[rows, ids].max(is_marked, mode="drop")


def static(**options: Any) -> Any:
    """A field of a processor that is part of the program, not an argument to it."""
    return field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def processor(cls: T) -> T:
    """Makes a frozen dataclass a pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@processor
class SequenceBias(Processor):
    """Adds to the score of a token that would complete a sequence: `sequence_bias`; also bad words.

    The sequences are `prefixes` [N, L], filled up with WILDCARD on the left, and `last` [N].
    """

    prefixes: Any
    last: Any
    bias: Any
    READS_PROMPT: ClassVar[bool] = True

    def _changed(self, scores: Scores, history: History) -> Scores:
        prefixes = jnp.asarray(self.prefixes, jnp.int32)[None]
        ending = history.ending(prefixes.shape[-1])[:, None]
        completes = jnp.all((prefixes == WILDCARD) | (prefixes == ending), axis=-1)  # [B, N]
        bias = jnp.where(completes, jnp.asarray(self.bias, jnp.float32)[None], 0.0)
        return scores + jnp.zeros_like(scores).at[:, jnp.asarray(self.last)].add(bias)


@processor
class RepetitionPenalty(Processor):
    """Makes what a row holds less likely: scores divided, negative ones multiplied (CTRL)."""

    penalty: Any
    READS_PROMPT: ClassVar[bool] = True

    def _changed(self, scores: Scores, history: History) -> Scores:
        punished = jnp.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return jnp.where(history.seen(scores.shape[-1]), punished, scores)


@processor
class NoRepeatNgrams(Processor):
    """Forbids the token that would end an n-gram which the row holds: `no_repeat_ngram_size`."""

    n: int = static()
    READS_PROMPT: ClassVar[bool] = True

    def _changed(self, scores: Scores, history: History) -> Scores:
        windows = history.ids.shape[1] - self.n + 1
        if windows < 1:
            return scores
        start = jnp.arange(windows)
        is_repeated = start[None] >= history.first[:, None]
        is_repeated &= (start + self.n - 1 < history.position)[None]
        ending = history.ending(self.n - 1)
        for i in range(self.n - 1):
            is_repeated &= history.ids[:, i : i + windows] == ending[:, i : i + 1]
        banned = mark(history.ids[:, self.n - 1 :], is_repeated, scores.shape[-1])
        return jnp.where(banned, -jnp.inf, scores)


@processor
class MinLength(Processor):
    """Forbids the end before prompt and answer have so many steps: `min_length`."""

    least: Any
    stop_ids: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_short = history.prompt_steps + history.step < self.least
        return jnp.where(is_short[:, None] & _among(self.stop_ids, scores), -jnp.inf, scores)


@processor
class MinNewTokens(Processor):
    """Forbids the end before the answer has so many tokens: `min_new_tokens`."""

    least: Any
    stop_ids: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_short = history.step < self.least
        return jnp.where(is_short & _among(self.stop_ids, scores), -jnp.inf, scores)


@processor
class ForcedFirst(Processor):
    """Makes the answer begin with a token: `forced_bos_token_id`."""

    token: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jnp.where(history.step == 0, _only((self.token,), scores), scores)


@processor
class ForcedEnd(Processor):
    """Makes an answer of full length end with one of these tokens: `forced_eos_token_id`."""

    tokens: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_last = history.step == history.limit - 1
        return jnp.where(is_last[:, None], _only(self.tokens, scores), scores)


@processor
class FiniteScores(Processor):
    """Turns NaN into 0 and infinities into the largest numbers: `remove_invalid_values`."""

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jnp.nan_to_num(scores, nan=0.0)


@processor
class DecayingLength(Processor):
    """Makes the end exponentially likelier after `start` tokens of the answer.

    `exponential_decay_length_penalty`: (start, factor).
    """

    start: Any
    factor: Any
    stop_ids: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        beyond = jnp.maximum(history.step - self.start, 0)
        gain = jnp.abs(scores) * (jnp.power(jnp.float32(self.factor), beyond) - 1.0)
        is_raised = _among(self.stop_ids, scores) & jnp.isfinite(scores)
        return scores + jnp.where(is_raised, gain, 0.0)


@processor
class Suppress(Processor):
    """Never says these tokens: `suppress_tokens`."""

    tokens: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jnp.where(_among(self.tokens, scores), -jnp.inf, scores)


@processor
class SuppressAt(Processor):
    """Does not say these tokens as token `step` of the answer: `begin_suppress_tokens`."""

    tokens: Any
    step: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        is_here = history.step == self.step
        return jnp.where(is_here & _among(self.tokens, scores), -jnp.inf, scores)


@processor
class Temperature(Processor):
    """Divides by the temperature."""

    value: Any

    def _changed(self, scores: Scores, history: History) -> Scores:
        return scores / self.value


@processor
class TopK(Processor):
    """`top_k`; the count is part of the program."""

    k: int = static()

    def _changed(self, scores: Scores, history: History) -> Scores:
        return warpers.keep_top_k(scores, self.k)


@processor
class Keep(Processor):
    """Cuts by one of the rules of `warpers`, `keep_top_p` for instance."""

    rule: Callable[..., Scores] = static()
    value: Any
    least: int = static(default=1)
    """Tokens that stay in any case."""

    def _changed(self, scores: Scores, history: History) -> Scores:
        return self.rule(scores, self.value, self.least)


@processor
class Renormalize(Processor):
    """Makes the scores log-probabilities again: `renormalize_logits`."""

    def _changed(self, scores: Scores, history: History) -> Scores:
        return jax.nn.log_softmax(scores, axis=-1)


def _among(ids: Any, scores: Scores) -> Bool[Array, "1 V"]:
    """True at these ids of the vocabulary.

    By comparison: a scatter into so few Booleans now and then lost its marks on CPUs.
    """
    vocabulary = jnp.arange(scores.shape[-1])
    return jnp.any(vocabulary[None] == jnp.asarray(ids, jnp.int32)[:, None], axis=0)[None]


def _only(ids: Any, scores: Scores) -> Float[Array, "1 V"]:
    """Scores that leave these ids alone."""
    return jnp.where(_among(ids, scores), 0.0, -jnp.inf)
