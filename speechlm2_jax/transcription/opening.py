"""Opens the model that a name means, for transcription: a SALM or an ASR model, from anywhere."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.evaluation.run_directories import Run, read_run, runs_below
from speechlm2_jax.inference.long_form.chunks import DEFAULT_MAX_AUDIO_S
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.pretrained.near_paths import RUNS
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription.missing_model import no_model

PROMPTED = ("SALM", "SALMWithAsrDecoder")
TRANSCRIBERS = (*PROMPTED, "ASRModel", "CTCModel")
"""Classes that transcribe."""
PROMPT = "Transcribe the following:"
"""The prompt of canary-qwen-2.5b, for a model whose training does not say another."""
MAX_NEW_TOKENS = 256
"""Longest text of a part of a recording, by default."""
_ON_COMMAND_LINE = "is no text of a command line; leave it out"
_REFUSED_KEYS = {
    "prompt": "use --prompt",
    "batch_size": "use --batch-size",
    "timestamps": "use --timestamps",
    "aligner": "use --aligner",
    "max_audio_s": "use --max-audio-s",
    "max_new_tokens": "use --max-new-tokens",
    "max_length": "use --max-new-tokens",
    "pad_token_id": "the model decides it; leave it out",
    "num_return_sequences": "a recording has one transcript; leave it out",
    **dict.fromkeys(("return_dict_in_generate", "token_logprobs"), "leave it out"),
    **dict.fromkeys(("assistant_model", "drafts", "should_stop"), _ON_COMMAND_LINE),
}
"""Keywords of `generate` that --set refuses, and what to do instead."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How recordings are transcribed; None: as the model was trained, or as it is usual."""

    prompt: str | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None
    max_audio_s: float | None = None
    timestamps: str | None = None
    aligner: str | None = None
    """An ASR model that finds the times of words; None: the model's own."""
    dtype: str | None = None
    quantize: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """More keywords of `generate`; for a model with an LLM."""

    def __post_init__(self) -> None:
        """Checks `generation`. Raises SettingsError for what no model takes."""
        if self.generation:
            _check_generation(self.generation)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is ready."""

    name: str
    sampling_rate: int
    transcribe: Callable[[Sequence[np.ndarray]], list[Transcript]]


def choose_model(name: str | None) -> str:
    """The name of the model, by default that of the newest run in ./runs that can transcribe.

    Raises SettingsError, with the names of public models, if there is none.
    """
    if name is not None:
        return name
    for run in runs_below(RUNS):
        if _transcribes(registry.identify(run.folder)):
            return str(run.folder)
    raise no_model()


def open_model(name: str, options: Options) -> OpenedModel:
    """Opens a run, a directory, a file or a hub name. Raises SettingsError if it cannot."""
    path = Location().find_model(name, key="--model")
    kind = registry.identify(path)
    if kind is None or not _transcribes(kind):
        what = kind.sentence(path) if kind else f"{path} is not a known model"
        raise SettingsError(f"--model: {what}; transcription needs a SALM or an ASR model")
    run = read_run(path)
    if set(kind.classes) & set(PROMPTED):
        return _open_prompted(name, path, kind.classes[0], run, options)
    return _open_asr(name, path, kind.classes[0], run, options)


def _transcribes(kind: registry.Kind | None) -> bool:
    return kind is not None and bool(set(kind.classes) & set(TRANSCRIBERS))


def _check_generation(keys: Mapping[str, Any]) -> None:
    """Raises SettingsError for keywords that `generate` refuses of any model."""
    from speechlm2_jax.inference.request.generation_request import ANY_VOCABULARY, read_request

    for key in keys:
        if key in _REFUSED_KEYS:
            raise SettingsError(f"--set {key}: {_REFUSED_KEYS[key]}")
    try:
        read_request(ANY_VOCABULARY, {**keys, "max_new_tokens": MAX_NEW_TOKENS})
    except (ValueError, TypeError) as error:
        joint = " " if str(error).startswith(tuple(keys)) else ": "
        raise SettingsError(f"--set{joint}{error}") from error


def _open_prompted(
    name: str, path: Path, kind: str, run: Run | None, options: Options
) -> OpenedModel:
    from speechlm2_jax import models

    dtype = options.dtype or (run.dtype if run else _usual_dtype())
    model = getattr(models, kind).from_pretrained(path, dtype=dtype, quantize=options.quantize)
    aligner = _aligner(options)
    prompt = options.prompt or (run and run.tag("context")) or PROMPT
    longest = options.max_audio_s or (run and run.max_audio_s) or DEFAULT_MAX_AUDIO_S

    def transcribe(waves: Sequence[np.ndarray]) -> list[Transcript]:
        return model.transcribe(
            list(waves),
            prompt=prompt,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
            timestamps=options.timestamps,
            aligner=aligner,
            max_audio_s=longest,
            **options.generation,
        )

    return OpenedModel(name=name, sampling_rate=model.sampling_rate, transcribe=transcribe)


def _open_asr(name: str, path: Path, kind: str, run: Run | None, options: Options) -> OpenedModel:
    from speechlm2_jax import models

    of_llm = {
        "--prompt": options.prompt,
        "--dtype": options.dtype,
        "--max-new-tokens": options.max_new_tokens,
        "--quantize": options.quantize,
        "--set": options.generation,
    }
    if refused := [flag for flag, value in of_llm.items() if value]:
        raise SettingsError(f"{', '.join(refused)}: leave out; {name} is an ASR model, without LLM")
    model = getattr(models, kind).from_pretrained(path)
    aligner = _aligner(options)
    longest = options.max_audio_s or (run and run.max_audio_s) or DEFAULT_MAX_AUDIO_S

    def transcribe(waves: Sequence[np.ndarray]) -> list[Transcript]:
        return model.transcribe(
            list(waves),
            batch_size=options.batch_size,
            timestamps=options.timestamps,
            aligner=aligner,
            max_audio_s=longest,
        )

    return OpenedModel(name=name, sampling_rate=model.sampling_rate, transcribe=transcribe)


def _aligner(options: Options) -> Aligner | None:
    """The aligner that is named, opened once for all recordings."""
    if options.aligner is None or options.timestamps is None:
        return None
    from speechlm2_jax.models.aligners import open_aligner

    return open_aligner(options.aligner, key="--aligner")


def _usual_dtype() -> str:
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
