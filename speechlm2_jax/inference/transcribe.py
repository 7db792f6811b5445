"""`transcribe` of every ASR model, and of a SALM with a prompt."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.generation.processors import WITHOUT_LOOPS_N
from speechlm2_jax.inference.audio_inputs import (
    Recordings,
    as_float,
    clips_of,
    is_array,
    items_of,
    split_audio,
)
from speechlm2_jax.inference.padding import SAMPLE_UNIT, round_up
from speechlm2_jax.inference.prompts import Prompts
from speechlm2_jax.inference.recordings_to_text import (
    ClipFunctions,
    ClipText,
    transcribe_recordings,
    words_by,
)
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.timestamps.confidence import ToText, word_confidences

DEFAULT_BATCH_SIZE = 16
Decode = Callable[[np.ndarray, np.ndarray], list[list[int]]]
"""Audio float32 [B, S] and lengths int32 [B] -> the labels of each recording."""
_WITHOUT_EFFECT = ("use_lhotse", "num_workers", "verbose")
"""Arguments of NeMo's `transcribe` that do not change the text."""
_REFUSED = ("return_hypotheses", "augmentor", "override_config")
"""Arguments that are not supported, unless they are None or False."""

WITHOUT_LOOPS: Mapping[str, object] = {"no_repeat_ngram_size": WITHOUT_LOOPS_N}
"""Keywords of `generate` for a clip over which the model repeated itself."""
WITHOUT_LOGPROBS = ("num_beams", "drafts", "assistant_model", "prompt_lookup_num_tokens")
"""Keywords of `generate` with which tokens have no log-probabilities, nor words a confidence."""
log = logging.getLogger(__name__)


def check_options(options: Mapping[str, object]) -> None:
    """Checks the arguments of NeMo's `transcribe` that have no parameter here.

    Raises ValueError for one that is not supported, TypeError for an unknown one.
    """
    for name, value in options.items():
        if name in _REFUSED and value not in (None, False):
            raise ValueError(f"transcribe: {name}={value!r} is not supported; leave it out")
        if name not in (*_WITHOUT_EFFECT, *_REFUSED):
            raise TypeError(f"transcribe: unknown argument {name!r}")


def read_recordings(
    audio: Recordings,
    lengths: ArrayLike | None,
    rate_hz: int,
    channel_selector: int | str | None = None,
) -> list[np.ndarray]:
    """Reads the recordings given to `transcribe` as float32 arrays [S] at `rate_hz`.

    `audio` is one recording or a list of them, in any form that `audio_inputs.clips_of` reads, or a
    batch [B, S] with `lengths` [B]. In batches and lists of arrays a recording may have no samples.
    Raises AudioError for an unusable recording, ValueError for a value that is not a recording.
    """
    channel = _channel(channel_selector)
    if lengths is not None or _is_batch(audio):
        waves = split_audio(audio, lengths, least=0)
    elif isinstance(audio, list | tuple) and all(is_array(a) and np.ndim(a) == 1 for a in audio):
        waves = [as_float(np.asarray(wave), f"recording {n}") for n, wave in enumerate(audio)]
    else:
        return [
            clip.samples
            for number, item in enumerate(items_of(audio))
            for clip in clips_of(item, f"recording {number}", rate_hz, channel)
        ]
    return [
        check_samples(wave, f"recording {n}") if len(wave) else wave for n, wave in enumerate(waves)
    ]


def transcribe(
    waves: Sequence[np.ndarray],
    decode: Decode,
    to_text: Callable[[list[int]], str],
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> list[Transcript]:
    """Transcribes recordings (float32 [S]) and returns the texts in the same order.

    The text of a recording without samples is "". Recordings of similar length share a batch of at
    most `batch_size`. The batch size, and the length in seconds, are rounded up to 1.0x or 1.5x a
    power of two, so that few programs are compiled.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order = sorted((i for i in range(len(waves)) if len(waves[i])), key=lambda i: len(waves[i]))
    texts = [Transcript()] * len(waves)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows, samples = round_up(len(chosen), 1), round_up(len(waves[chosen[-1]]), SAMPLE_UNIT)
        labels = decode(*pad_right([waves[i] for i in chosen], rows=rows, width=samples))
        for i, own in zip(chosen, labels, strict=False):  # further rows are padding
            texts[i] = Transcript(to_text(own))
    return texts


@runtime_checkable
class PromptedModel(Protocol):
    """What transcription needs of a SALM."""

    @property
    def audio_locator_tag(self) -> str:
        """The text of one audio placeholder."""
        ...

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the model's input."""
        ...

    @property
    def end_ids(self) -> Sequence[int]:
        """Ids of all tokens that end a response."""
        ...

    @property
    def text_pad_id(self) -> int:
        """Id of padding."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Turns ids into text."""
        ...

    def generate(self, prompts: Prompts, **generation_kwargs: Any) -> Any:
        """Token ids of the responses; see SALM.generate."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a SALM transcribes; see SALM.transcribe."""

    prompt: str
    batch_size: int
    timestamps: str | None
    max_audio_s: float | None
    generation: Mapping[str, object]
    """Keywords of `generate`."""
    find_aligner: Callable[[], Aligner | None]
    """Opens what finds the times of words."""


def transcribe_by_prompt(
    model: PromptedModel, audio: Recordings, options: PromptOptions
) -> list[Transcript]:
    """Transcribes with a prompt; see SALM.transcribe."""
    if options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} must be at least 1")
    for key in ("num_return_sequences", "return_dict_in_generate"):
        if options.generation.get(key) not in (None, False, 1):
            raise ValueError(f"transcribe: {key} is not supported; use generate")
    functions = ClipFunctions(
        rate_hz=model.sampling_rate,
        to_texts=lambda clips: _texts_by_prompt(model, clips, options, {}),
        to_texts_again=lambda clips: _texts_by_prompt(model, clips, options, WITHOUT_LOOPS),
        to_words=words_by(options.find_aligner, model.sampling_rate),
        has_confidences=True,
    )
    items, found = items_of(audio), list[Transcript]()
    for start in range(0, len(items), options.batch_size):
        chosen = items[start : start + options.batch_size]
        found += transcribe_recordings(
            [_wave(item, n, model.sampling_rate) for n, item in enumerate(chosen, start)],
            functions,
            timestamps=options.timestamps,
            max_audio_s=options.max_audio_s,
        )
    return found


def _wave(item: Any, number: int, rate_hz: int) -> np.ndarray:
    """The samples of one recording."""
    (clip,) = clips_of([item], f"recording {number}", rate_hz)
    return clip.samples


def _texts_by_prompt(
    model: PromptedModel,
    clips: Sequence[np.ndarray],
    options: PromptOptions,
    more: Mapping[str, object],
) -> list[ClipText]:
    """The response to the prompt for each clip; clips of similar length share a batch."""
    tag, prompt = model.audio_locator_tag, options.prompt
    content = prompt if tag in prompt else f"{prompt} {tag}".strip()
    left_out = [*model.end_ids, model.text_pad_id]
    order = sorted(range(len(clips)), key=lambda n: len(clips[n]))
    texts = [ClipText("")] * len(clips)
    # cut already; what the model still gets is not cut again
    asked = {**options.generation, **more, "max_audio_s": False}
    if options.timestamps and not any(asked.get(key) for key in WITHOUT_LOGPROBS):
        asked |= {"return_dict_in_generate": True, "token_logprobs": True}
    for start in range(0, len(clips), options.batch_size):
        chosen = order[start : start + options.batch_size]
        turns = [[{"role": "user", "content": content, "audio": [clips[n]]}] for n in chosen]
        made = model.generate(turns, **asked)
        rows, logprobs = getattr(made, "sequences", made), getattr(made, "token_logprobs", None)
        for row, n in enumerate(chosen):
            is_text = ~np.isin(rows[row], left_out)
            ids = rows[row][is_text]
            own = None if logprobs is None else logprobs[row][is_text]
            texts[n] = _clip_text(ids, own, model.tokenizer.ids_to_text)
            _note_cut_off(rows[row], model, asked)
    return texts


def _clip_text(ids: np.ndarray, logprobs: np.ndarray | None, to_text: ToText) -> ClipText:
    text = to_text(ids.tolist())
    if logprobs is None:
        return ClipText(text)
    return ClipText(text, tuple(word_confidences(ids.tolist(), logprobs, to_text)))


def _note_cut_off(ids: np.ndarray, model: PromptedModel, asked: Mapping[str, object]) -> None:
    """Logs a response that was ended by `max_new_tokens`."""
    if len(ids) == asked.get("max_new_tokens") and not np.isin(ids, model.end_ids).any():
        log.warning(
            "a text was ended after max_new_tokens=%d and may miss its end; raise it", len(ids)
        )


def _is_batch(audio: Recordings) -> bool:
    if is_array(audio):
        return np.ndim(audio) != 1
    first = audio[0] if isinstance(audio, list) and audio else None
    return isinstance(first, list) and all(isinstance(value, Real) for value in first[:2])


def _channel(selector: int | str | None) -> int | None:
    if isinstance(selector, int) and not isinstance(selector, bool) and selector >= 0:
        return selector
    if selector not in (None, "average"):
        raise ValueError(f"channel_selector={selector!r} must be a channel from 0, or average")
    return None
