"""Reads transformers' GenerationConfig, or a dict of its keys, into a `GenerationRequest`."""

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from speechlm2_jax.bundled import page
from speechlm2_jax.generation.decoding import BeamConfig, DecodingConfig
from speechlm2_jax.generation.drafts import LookupDrafter
from speechlm2_jax.inference.draft_models import DraftModel
from speechlm2_jax.inference.long_form.chunks import DEFAULT_MAX_AUDIO_S
from speechlm2_jax.inference.padding import round_up
from speechlm2_jax.inference.request.defaults import with_defaults
from speechlm2_jax.inference.request.keys import ARGUMENTS, HONOURED, IGNORED, OWN, REFUSED
from speechlm2_jax.inference.request.processors import make_processors
from speechlm2_jax.inference.request.values import check_values, ids_of

N = TypeVar("N")
DEFAULT_NEW_TOKENS = 20
"""transformers' own default."""
DEFAULT_DRAFT_TOKENS = 20
"""transformers' own default of `num_assistant_tokens`."""
DEFAULT_LLM_DRAFT_TOKENS = 4
"""A draft LLM runs once for each."""
DEFAULT_NGRAM = 2
"""transformers' own default of `max_matching_ngram_size`."""


@runtime_checkable
class Vocabulary(Protocol):
    """What reading a request needs of a model."""

    @property
    def text_eos_id(self) -> int | None:
        """The default end token."""
        ...

    @property
    def text_pad_id(self) -> int:
        """The default padding token."""
        ...

    @property
    def text_vocab_size(self) -> int:
        """The number of tokens."""
        ...


@runtime_checkable
class HasDefaults(Protocol):
    """A model whose LLM decides what a call leaves open."""

    @property
    def end_ids(self) -> Sequence[int]:
        """All tokens that end a response."""
        ...

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The LLM's generation_config.json, or nothing."""
        ...


class _AnyVocabulary:
    text_eos_id = 0
    text_pad_id = 0
    text_vocab_size = 2**31 - 1


ANY_VOCABULARY: Vocabulary = _AnyVocabulary()
"""Stands for a model that is not loaded yet, to check a request early."""


@runtime_checkable
class SupportsToDict(Protocol):
    """A transformers GenerationConfig."""

    def to_dict(self) -> dict[str, Any]:
        """Its keys and values."""
        ...


@runtime_checkable
class DraftTranscriber(Protocol):
    """An ASR model whose transcripts are drafts; `models.ASRModel` and `models.CTCModel` are."""

    @property
    def sampling_rate(self) -> int:
        """Of its input, in Hz."""
        ...

    def transcribe(self, audio: Any) -> Sequence[str]:
        """The text of each float32 [S] recording."""
        ...


@runtime_checkable
class HasDraftModel(Protocol):
    """A model with an LLM that proposes draft tokens; `models.SALM` and `models.DraftLLM` are."""

    def as_draft_model(self) -> DraftModel:
        """Its LLM, and what encodes its prompts."""
        ...


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """Speculative decoding with a text for each prompt, or an LLM. One of these fields is set."""

    transcriber: DraftTranscriber | None = None
    texts: tuple[str, ...] | None = None
    """One for each prompt."""
    model: DraftModel | None = None
    tokens: int = DEFAULT_DRAFT_TOKENS
    """Most draft tokens per pass."""


GenerationConfigLike = Mapping[str, object] | SupportsToDict | None
"""A GenerationConfig, or a mapping of its keys."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Checked settings of one call of `generate`."""

    decoding: DecodingConfig[int]
    max_new_tokens: int | None
    max_length: int | None
    """Most tokens of prompt and response together. Read only if `max_new_tokens` is None."""
    seed: int = 0
    returns_dict: bool = False
    stop_strings: tuple[str, ...] = ()
    max_time_s: float | None = None
    should_stop: Callable[[], bool] | None = None
    max_audio_s: float | None = DEFAULT_MAX_AUDIO_S
    """Longer recordings are split into chunks; None: recordings are never split."""
    enable_thinking: bool | None = None
    """Whether a response may start with a thought; None: the prompt format's default."""
    drafting: DraftRequest | None = None
    """Speculative decoding with texts or an LLM; prompt lookup is in `decoding.drafter`."""

    @property
    def is_speculative(self) -> bool:
        """Whether draft tokens are used."""
        return self.drafting is not None or self.decoding.drafter is not None

    def limits(self, prompt_lengths: Int[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """The largest number of new tokens of each prompt.

        Raises ValueError if a prompt is as long as `max_length`.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            limit = self.max_new_tokens or DEFAULT_NEW_TOKENS
            return np.full(prompt_lengths.shape, limit, np.int32)
        if (prompt_lengths >= self.max_length).any():
            raise ValueError(
                f"max_length={self.max_length} leaves no room after a prompt of "
                f"{prompt_lengths.max()} positions; use max_new_tokens"
            )
        return (self.max_length - prompt_lengths).astype(np.int32)

    def fitting(self, limits: Int[np.ndarray, "..."]) -> DecodingConfig[int]:
        """The decoding settings with room for the largest of `limits`, rounded up."""
        return replace(self.decoding, max_new_tokens=round_up(int(limits.max()), 1))


def read_request(
    model: Vocabulary,
    config: GenerationConfigLike = None,
    overrides: Mapping[str, object] | None = None,
) -> GenerationRequest:
    """Reads a GenerationConfig, or a mapping of its keys. `overrides` replace its values.

    What neither sets comes from the LLM's generation_config.json (`with_defaults`). The default is
    greedy decoding that stops at any of the model's end tokens. Raises ValueError for a key that is
    unknown or not supported, and for a value of the wrong type or out of range. Warns of a key that
    has no effect in combination with the others.
    """
    asked = _merged(config, overrides or {})
    has_defaults = isinstance(model, HasDefaults)
    end_ids = list(model.end_ids) if has_defaults else ids_of(model.text_eos_id)
    check_values(asked, model.text_vocab_size, (*end_ids, model.text_eos_id, model.text_pad_id))
    if has_defaults:
        asked = with_defaults(asked, model.generation_defaults, model.text_vocab_size)
    _check_together(asked)
    _check_logprobs(asked)
    _warn_of_no_effect(asked)
    stops = ids_of(asked.get("eos_token_id", end_ids))
    pad_id = asked.get("pad_token_id", model.text_pad_id)
    beams = int(asked.get("num_beams", 1))
    decoding = DecodingConfig(
        max_new_tokens=1,
        stop_ids=tuple(stops),
        pad_id=int(pad_id),
        processors=make_processors(asked, stops, model.text_vocab_size),
        do_sample=bool(asked.get("do_sample", False)),
        return_sequences=int(asked.get("num_return_sequences", 1)),
        beams=None if beams == 1 else _beams(asked, beams),
        drafter=_lookup(asked),
        keeps_logprobs=bool(asked.get("token_logprobs", False)),
    )
    strings = asked.get("stop_strings", ())
    return GenerationRequest(
        decoding=decoding,
        max_new_tokens=_plain(int, asked.get("max_new_tokens")),
        max_length=_plain(int, asked.get("max_length")),
        seed=int(asked.get("seed", 0)),
        returns_dict=bool(asked.get("return_dict_in_generate", False)),
        stop_strings=(strings,) if isinstance(strings, str) else tuple(strings),
        max_time_s=_plain(float, asked.get("max_time")),
        should_stop=asked.get("should_stop"),
        max_audio_s=float(asked.get("max_audio_s", DEFAULT_MAX_AUDIO_S)) or None,
        enable_thinking=asked.get("enable_thinking"),
        drafting=_drafting(asked),
    )


def _plain(kind: Callable[..., N], value: object) -> N | None:
    """Converts a NumPy or JAX scalar to a Python number; None stays."""
    return None if value is None else kind(value)


def _merged(config: GenerationConfigLike, overrides: Mapping[str, object]) -> dict[str, Any]:
    """All keys whose value is not None. Raises ValueError for a key that is not supported."""
    if config is None:
        given: dict[str, Any] = {}
    elif isinstance(config, Mapping):
        given = dict(config)
    elif hasattr(config, "to_dict"):
        given = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    else:
        raise ValueError(
            f"generation_config: expected a transformers GenerationConfig or a dict of its keys, "
            f"got {type(config).__name__}"
        )
    merged = {k: v for k, v in (given | dict(overrides)).items() if v is not None}
    for key, value in merged.items():
        if key in REFUSED and value is not False and value not in REFUSED[key].harmless:
            raise ValueError(f"generate: {key}={value!r} is not supported: {REFUSED[key].reason}")
        if key in ARGUMENTS:
            raise ValueError(f"generate: {key} is not supported: {ARGUMENTS[key]}")
        known = (*HONOURED, *IGNORED, *REFUSED, *OWN)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            every = f"; {page('generation.md')} lists every key"
            hint = f"; did you mean {near[0]}?" if near else every
            raise ValueError(f"generate does not know {key!r}{hint}")
    return {k: v for k, v in merged.items() if k in HONOURED or k in OWN}


_SAMPLING_ONLY: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0, 0.0),
    "top_k": (0, -1, 1, 50),
    "top_p": (1.0, 0.0),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
"""Keys without effect in greedy decoding, and the values that need no warning."""
_BEAMS_ONLY: Mapping[str, tuple[Any, ...]] = {"length_penalty": (1.0,), "early_stopping": (False,)}


_DRAFTS = ("assistant_model", "drafts", "prompt_lookup_num_tokens")
"""The keys that name a source of drafts."""


def _check_together(asked: Mapping[str, Any]) -> None:
    """Raises ValueError for values that contradict each other."""
    beams, sequences = asked.get("num_beams", 1), asked.get("num_return_sequences", 1)
    if sequences > 1 and beams == 1 and not asked.get("do_sample"):
        raise ValueError(
            f"num_return_sequences={sequences} needs do_sample=True or num_beams: greedy decoding "
            "gives one sequence"
        )
    if 1 < beams < sequences:
        raise ValueError(f"num_return_sequences={sequences} exceeds num_beams={beams}")
    if beams > 1 and asked.get("stop_strings"):
        raise ValueError("stop_strings are not supported with beam search; leave num_beams out")
    if beams == 1 and asked.get("output_scores"):
        raise ValueError("output_scores: scores of each token are not kept; leave it out")
    drafts = [key for key in _DRAFTS if asked.get(key) is not None]
    if len(drafts) > 1:
        raise ValueError(f"{drafts[0]} and {drafts[1]}: give one source of drafts")
    if drafts and beams > 1:
        raise ValueError(f"{drafts[0]}: beam search has no drafts; leave it or num_beams out")
    longest = asked.get("max_new_tokens")
    if longest is not None and asked.get("min_new_tokens", 0) > longest:
        raise ValueError(
            f"min_new_tokens={asked['min_new_tokens']} exceeds max_new_tokens={longest}"
        )


def _check_logprobs(asked: Mapping[str, Any]) -> None:
    """Raises ValueError if log-probabilities cannot be kept, or not be returned."""
    if not asked.get("token_logprobs"):
        return
    if not asked.get("return_dict_in_generate"):
        raise ValueError("token_logprobs needs return_dict_in_generate=True")
    others = [key for key in _DRAFTS if asked.get(key) is not None]
    others += ["num_beams"] if asked.get("num_beams", 1) > 1 else []
    if others:
        raise ValueError(f"token_logprobs is not supported with {others[0]}; leave one out")


def _warn_of_no_effect(asked: Mapping[str, Any]) -> None:
    """Warns of keys that only sampling or beam search reads, if the request uses neither."""
    unread = {"do_sample=True": {} if asked.get("do_sample") else _SAMPLING_ONLY}
    unread["num_beams above 1"] = {} if asked.get("num_beams", 1) > 1 else _BEAMS_ONLY
    for needed, keys in unread.items():
        for key, neutral in keys.items():
            if key in asked and asked[key] not in neutral:
                warnings.warn(
                    f"generate: {key}={asked[key]!r} has no effect without {needed}", stacklevel=4
                )


def _lookup(asked: Mapping[str, Any]) -> LookupDrafter | None:
    count = asked.get("prompt_lookup_num_tokens")
    ngram = int(asked.get("max_matching_ngram_size", DEFAULT_NGRAM))
    return None if count is None else LookupDrafter(tokens=int(count), ngram=ngram)


def _drafting(asked: Mapping[str, Any]) -> DraftRequest | None:
    model, texts = asked.get("assistant_model"), asked.get("drafts")
    if model is None and texts is None:
        return None
    is_llm = isinstance(model, HasDraftModel)
    default = DEFAULT_LLM_DRAFT_TOKENS if is_llm else DEFAULT_DRAFT_TOKENS
    return DraftRequest(
        transcriber=None if is_llm else model,
        texts=None if texts is None else tuple(texts),
        model=model.as_draft_model() if is_llm else None,
        tokens=int(asked.get("num_assistant_tokens", default)),
    )


def _beams(asked: Mapping[str, Any], count: int) -> BeamConfig:
    return BeamConfig(
        count=count,
        length_penalty=float(asked.get("length_penalty", 1.0)),
        early_stopping=asked.get("early_stopping", False),
    )
