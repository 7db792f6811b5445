"""What the LLM's own generation_config.json sets where a call of `generate` does not."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from speechlm2_jax.inference.request.keys import HONOURED, IGNORED, REFUSED
from speechlm2_jax.inference.request.values import SAMPLING_KEYS, check_values

NOT_TAKEN: Mapping[str, str] = {
    "do_sample": "greedy by default, as NeMo's saved models are; files of chat models ask for it",
    "eos_token_id": "part of the model's `end_ids`",
    "pad_token_id": "the model's `text_pad_id` pads",
    "num_return_sequences": "a call has one response to each prompt, unless it asks for more",
    "return_dict_in_generate": "the call decides what it returns",
    "output_scores": "the call decides what it returns",
}
"""Keys of the file that are no defaults."""
_BEAM_KEYS = ("length_penalty", "early_stopping")
_LENGTHS = ("max_new_tokens", "max_length")

log = logging.getLogger(__name__)


def with_defaults(
    asked: Mapping[str, Any], file: Mapping[str, Any], vocabulary: int
) -> dict[str, Any]:
    """Adds what the file sets to what a call asks for, which overrides it.

    Keys that only sampling or beam search reads are added where the call uses it. A value that is
    not supported is left out, with one warning.
    """
    usable = {k: v for k, v in file.items() if v is not None and _is_usable(k, v, vocabulary)}
    if any(key in asked for key in _LENGTHS):  # one of them overrides the other
        usable = {k: v for k, v in usable.items() if k not in _LENGTHS}
    merged = {**usable, **asked}
    unread = () if merged.get("do_sample") else SAMPLING_KEYS
    unread += () if merged.get("num_beams", 1) > 1 else _BEAM_KEYS
    return {k: v for k, v in merged.items() if k in asked or k not in unread}


def _is_usable(key: str, value: Any, vocabulary: int) -> bool:
    if key in IGNORED or key in NOT_TAKEN:
        return False
    if key in REFUSED and value is not False and value not in REFUSED[key].harmless:
        _warn(key, repr(value), f"it is not supported: {REFUSED[key].reason}")
    if key not in HONOURED:  # transformers keeps keys of a model's own there, without effect
        return False
    try:
        check_values({"do_sample": True, key: value}, vocabulary, ())
    except (ValueError, TypeError) as error:
        _warn(key, repr(value), str(error))
        return False
    return True


@cache
def _warn(key: str, value: str, reason: str) -> None:
    """Warns once."""
    log.warning(
        "generation_config.json of the LLM: %s=%s is left out: %s", *(key, value[:200], reason)
    )
