"""The logits processors of a GenerationConfig, in transformers' order."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.generation import processors as p
from speechlm2_jax.generation import warpers
from speechlm2_jax.inference.padding import round_up
from speechlm2_jax.inference.request.values import Biases, bias_pairs, ids_of

SAMPLING_DEFAULTS: Mapping[str, Any] = {"top_k": 50}
"""transformers' defaults of sampling that change the distribution."""
LIST_UNIT = 8
"""Lists of tokens are padded to 8, 16, 24, 32, 48, ... entries: few programs are compiled."""
Makers = Mapping[str, tuple[Any, Callable[[Any], p.Processor]]]
"""Key -> (the value that has no effect, the function that makes a processor from another value)."""


def make_processors(
    asked: Mapping[str, Any], stops: Sequence[int], vocabulary: int
) -> tuple[p.Processor, ...]:
    """Makes the processors that change the model's logits before a token is chosen.

    `asked` has passed `check_values`.
    """
    makers: dict[str, tuple[Any, Callable[[Any], p.Processor]]] = {
        **_repetitions(stops),
        **_lengths(stops, vocabulary),
        **_suppressions(vocabulary, begin=int("forced_bos_token_id" in asked)),
    }
    if "min_new_tokens" in asked:  # replaces min_length, as in transformers
        del makers["min_length"]
    if asked.get("do_sample"):
        # beam search needs tokens that do not end a beam, as in transformers
        makers |= _warpers(max(2, len(stops) + 1) if asked.get("num_beams", 1) > 1 else 1)
        asked = {**SAMPLING_DEFAULTS, **asked}
        asked["top_k"] = max(int(asked["top_k"]), 0)  # -1 keeps every token too
    makers["renormalize_logits"] = (False, lambda v: p.Renormalize())
    return tuple(
        make(asked[key])
        for key, (neutral, make) in makers.items()
        if key in asked and not _has_no_effect(asked[key], neutral)
    )


def _repetitions(stops: Sequence[int]) -> Makers:
    def bad_words(words: Iterable[ArrayLike]) -> p.Processor:
        ids = [tuple(ids_of(word)) for word in words]
        bad = {word: -np.inf for word in ids if word not in [(s,) for s in stops]}
        return _sequence_bias(bad)

    def sequence_bias(bias: Biases) -> p.Processor:
        return _sequence_bias({tuple(ids_of(ids)): float(v) for ids, v in bias_pairs(bias)})

    return {
        "sequence_bias": (None, sequence_bias),
        "repetition_penalty": (1.0, lambda v: p.RepetitionPenalty(float(v))),
        "no_repeat_ngram_size": (0, lambda v: p.NoRepeatNgrams(int(v))),
        "bad_words_ids": (None, bad_words),
    }


def _lengths(stops: Sequence[int], vocabulary: int) -> Makers:
    ends = np.asarray(stops, np.int32)
    return {
        "min_length": (0, lambda v: p.MinLength(int(v), ends)),
        "min_new_tokens": (0, lambda v: p.MinNewTokens(int(v), ends)),
        "forced_bos_token_id": (None, lambda v: p.ForcedFirst(int(v))),
        "forced_eos_token_id": (None, lambda v: p.ForcedEnd(_filled(ids_of(v), vocabulary))),
        "remove_invalid_values": (False, lambda v: p.FiniteScores()),
        "exponential_decay_length_penalty": (
            None,
            lambda v: p.DecayingLength(int(v[0]), float(v[1]), ends),
        ),
    }


def _suppressions(vocabulary: int, begin: int) -> Makers:
    return {
        "suppress_tokens": (None, lambda v: p.Suppress(_filled(ids_of(v), vocabulary))),
        "begin_suppress_tokens": (
            None,
            lambda v: p.SuppressAt(_filled(ids_of(v), vocabulary), begin),
        ),
    }


def _warpers(least: int) -> Makers:
    """The processors of sampling. Those that truncate keep at least `least` tokens."""

    def keep(rule: Callable[..., p.Scores], least: int = least) -> Callable[[Any], p.Processor]:
        return lambda v: p.Keep(rule, float(v), least)

    return {
        "temperature": (1.0, lambda v: p.Temperature(float(v))),
        "top_h": (None, keep(warpers.keep_top_h, 1)),
        "top_k": (0, lambda v: p.TopK(max(int(v), least))),
        "top_p": (1.0, keep(warpers.keep_top_p)),
        "min_p": (0.0, keep(warpers.keep_min_p)),
        "typical_p": (1.0, keep(warpers.keep_typical)),
        "epsilon_cutoff": (0.0, keep(warpers.keep_epsilon)),
        "eta_cutoff": (0.0, keep(warpers.keep_eta)),
    }


def _sequence_bias(biases: Mapping[tuple[int, ...], float]) -> p.SequenceBias:
    """Puts all sequences into one padded array, so that lists of similar length share a program."""
    count = round_up(len(biases), LIST_UNIT)
    longest = max(map(len, biases), default=1) - 1
    width = round_up(longest, 1) if longest else 0
    prefixes = np.full((count, width), p.WILDCARD, np.int32)
    last, bias = np.zeros(count, np.int32), np.zeros(count, np.float32)
    for i, (ids, value) in enumerate(biases.items()):
        prefixes[i, width - len(ids) + 1 :] = ids[:-1]
        last[i], bias[i] = ids[-1], value
    return p.SequenceBias(prefixes, last, bias)


def _filled(ids: list[int], vocabulary: int) -> np.ndarray:
    """Pads a list of ids with an id beyond the vocabulary."""
    out = np.full(round_up(len(ids), LIST_UNIT), vocabulary, np.int32)
    out[: len(ids)] = ids
    return out


def _has_no_effect(value: object, neutral: object) -> bool:
    if isinstance(value, Sequence | Mapping | np.ndarray):
        return len(value) == 0
    return neutral is not None and bool(value == neutral)
