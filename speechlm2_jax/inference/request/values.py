"""Type and range of each key of a generation request."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from speechlm2_jax.arrays import ArrayLike

INT32_END = 2**31
Biases = Mapping[Any, float] | Sequence[Sequence[Any]]
"""A `sequence_bias`: token ids -> bias."""
SAMPLING_KEYS = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
"""Keys that only sampling reads (`do_sample=True`)."""


def check_values(asked: Mapping[str, Any], vocabulary: int, own_ids: Sequence[int | None]) -> None:
    """Raises ValueError for a value of the wrong type or range, naming its key.

    Without `do_sample`, the keys that only sampling reads may be any number, because many callers
    write temperature=0 for greedy decoding. `own_ids` are the model's end and padding tokens. They
    may lie outside its embedding table.
    """
    unread = () if asked.get("do_sample") else SAMPLING_KEYS
    for keys, is_fine, expected in _VALUES:
        for key in keys:
            is_right = _is_number if key in unread else is_fine
            if key in asked and not is_right(asked[key]):
                raise ValueError(f"{key}={_short(asked[key])} {expected}{_HINTS.get(key, '')}")
    for key in _TOKENS:
        check_ids(key, [i for i in ids_of(asked.get(key)) if i not in own_ids], vocabulary)
    for ids in asked.get("bad_words_ids", ()):
        check_ids("bad_words_ids", ids_of(ids), vocabulary)
    for ids, _ in bias_pairs(asked.get("sequence_bias", ())):
        check_ids("sequence_bias", ids_of(ids), vocabulary)


def ids_of(value: ArrayLike | None) -> list[int]:
    """One id or several as a list; None gives an empty list."""
    return [] if value is None else [int(i) for i in np.asarray(value).reshape(-1)]


def bias_pairs(bias: Biases) -> list[tuple[Any, Any]]:
    """The pairs (ids, bias) of a `sequence_bias`, which is a mapping or a list of pairs."""
    return list(bias.items()) if isinstance(bias, Mapping) else [tuple(pair) for pair in bias]


def check_ids(key: str, ids: Sequence[int], vocabulary: int) -> None:
    """Raises ValueError for ids outside the vocabulary."""
    wrong = [int(i) for i in ids if not 0 <= i < vocabulary]
    if wrong:
        is_known = vocabulary < INT32_END - 1  # otherwise no model is loaded yet
        last = f" to {vocabulary - 1}: this vocabulary has {vocabulary} tokens" if is_known else ""
        raise ValueError(f"{key}: {_short(wrong)} are not token ids; give ids from 0{last}")


def _short(value: object) -> str:
    return reprlib.repr(value)


def _array(value: object) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError):  # lists of several lengths
        return np.empty(1, object)


def _number(value: object) -> float:
    """A value as a float; NaN if it is not a finite number."""
    array = _array(value)
    is_number = array.ndim == 0 and array.dtype.kind in "iuf" and np.isfinite(array)
    return float(array) if is_number else math.nan


def _is_number(value: object) -> bool:
    return not math.isnan(_number(value))


def _is_whole(value: object, least: int, end: int = INT32_END) -> bool:
    number = _number(value)
    return least <= number < end and number == math.floor(number)


def _is_bool(value: object) -> bool:
    array = _array(value)
    return array.ndim == 0 and (array.dtype.kind == "b" or _number(value) in (0, 1))


def _is_id(value: object) -> bool:
    array = _array(value)
    return array.ndim == 0 and array.dtype.kind in "iu"


def _is_ids(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a value is a list of whole numbers; it may be empty."""
    array = _array(value)
    return array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)


def _is_sequence(value: object) -> bool:
    """Whether a value is a list of at least one id."""
    return _is_ids(value) and len(value) > 0


def _is_list(value: object) -> TypeGuard[Sequence[Any] | np.ndarray]:
    is_array = isinstance(value, np.ndarray) and value.ndim > 0
    return is_array or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def _are_sequences(value: object) -> bool:
    return _is_list(value) and all(_is_sequence(ids) for ids in value)


def _are_biases(value: object) -> bool:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    return _is_list(pairs) and all(
        _is_list(pair) and len(pair) == 2 and _is_sequence(pair[0]) and _is_bias(pair[1])
        for pair in pairs
    )


def _is_bias(value: object) -> bool:
    """Whether a value is a number. Infinity forces a sequence, minus infinity forbids it."""
    array = _array(value)
    return array.ndim == 0 and array.dtype.kind in "iuf" and not np.isnan(array)


def _are_texts(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (isinstance(texts, str) or _is_list(texts)) and all(
        isinstance(text, str) and text for text in texts
    )


def _are_drafts(value: object) -> bool:
    return _is_list(value) and all(isinstance(text, str) for text in value)


def _is_assistant(value: object) -> bool:
    transcribes = callable(getattr(value, "transcribe", None)) and hasattr(value, "sampling_rate")
    return transcribes or callable(getattr(value, "as_draft_model", None))


def _is_decay(value: Any) -> bool:
    is_pair = _is_list(value) and len(value) == 2
    return is_pair and _is_whole(value[0], 0) and _number(value[1]) > 0


def _is_seconds(value: object) -> bool:
    return value is False or _number(value) >= 1


def _is_stopping(value: object) -> bool:
    return _is_bool(value) or (isinstance(value, str) and value == "never")


_POSITIVE = ("temperature", "repetition_penalty", "max_time")
_COUNTS = (
    *("max_new_tokens", "max_length", "num_beams", "num_return_sequences"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"),
)
_NOT_NEGATIVE = ("min_new_tokens", "min_length", "no_repeat_ngram_size")
_SHARES = ("typical_p", "top_h")  # above 0, at most 1
_CUTOFFS = ("min_p", "epsilon_cutoff", "eta_cutoff")  # from 0, below 1
_FLAGS = (
    "do_sample",
    "return_dict_in_generate",
    "renormalize_logits",
    "remove_invalid_values",
    "output_scores",
    "token_logprobs",
    "enable_thinking",
)
_ONE_ID = ("forced_bos_token_id", "pad_token_id")
_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_TOKENS = (*_ONE_ID, *_IDS)
_HINTS: Mapping[str, str] = {
    "temperature": "; or do_sample=False",
    "stop_strings": "; an empty one would end every response",
}
_VALUES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_POSITIVE, lambda v: _number(v) > 0, "must be a positive number"),
    (_COUNTS, lambda v: _is_whole(v, 1), "must be a whole number from 1, below 2^31"),
    (_NOT_NEGATIVE, lambda v: _is_whole(v, 0), "must be a whole number, not negative"),
    (("top_k",), lambda v: _is_whole(v, -1), "must be a whole number; 0 or -1 keeps every token"),
    (("top_p",), lambda v: 0 <= _number(v) <= 1, "must be a number in [0, 1]"),
    (("seed",), lambda v: _is_whole(v, -(2**63), 2**63), "must be a whole number of 64 bits"),
    (_SHARES, lambda v: 0 < _number(v) <= 1, "must be a number in (0, 1]"),
    (_CUTOFFS, lambda v: 0 <= _number(v) < 1, "must be a number in [0, 1)"),
    (("length_penalty",), lambda v: not math.isnan(_number(v)), "must be a number"),
    (("max_audio_s",), _is_seconds, "must be at least 1, or false: give seconds"),
    (("early_stopping",), _is_stopping, "must be true, false or never"),
    (_FLAGS, _is_bool, "must be true or false"),
    (("should_stop",), callable, "must be a function without arguments"),
    (_ONE_ID, _is_id, "must be one token id"),
    (_IDS, lambda v: _is_id(v) or _is_ids(v), "must be one token id, or a list of them"),
    (("bad_words_ids",), _are_sequences, "must be a list of lists of token ids, as [[3], [4, 5]]"),
    (
        ("sequence_bias",),
        _are_biases,
        "must be pairs of token ids and a number, as [[[3], -1.5], [[4, 5], 2.0]]",
    ),
    (("stop_strings",), _are_texts, "must be a text, or a list of them, none empty"),
    (("drafts",), _are_drafts, "must be a list of texts, one for each prompt"),
    (
        ("assistant_model",),
        _is_assistant,
        "must be an ASRModel, a CTCModel, a SALM, or the directory of a SALM or an LLM",
    ),
    (
        ("exponential_decay_length_penalty",),
        _is_decay,
        "must be [start, factor]: a whole number of tokens and a positive number, as [10, 1.1]",
    ),
)
"""(keys, whether a value is valid, what it must be)."""
