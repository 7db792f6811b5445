"""Clips in, ids out: how an evaluation asks its model."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.reading import Clip


@runtime_checkable
class SpeechModel(Protocol):
    """What the runner asks of a model; `speechlm2_jax.models.SALM` is one."""

    tokenizer: Any
    audio_locator_tag: str
    sampling_rate: int
    text_bos_id: int | None
    text_eos_id: int | None
    text_pad_id: int

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Answers as ids, one row per prompt."""
        ...


@dataclass(frozen=True)
class Asked:
    """What every clip is asked, and how."""

    prompt: list[dict[str, str]]
    stop_ids: list[int]
    config: EvalConfig


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Clips whose answers became known together."""

    rows: list[tuple[Clip, np.ndarray]]
    """With the ids of each answer."""
    audio_s: float
    seconds: float
    """Of the model, reading excluded."""
    is_compiled: bool
    """Whether something was compiled meanwhile."""


def in_batches(model: SpeechModel, clips: Iterator[Clip], asked: Asked) -> Iterator[Ended]:
    """Answers `batch_size` clips at a time; a short batch after others repeats its last clip."""
    size, fill = asked.config.batch_size, False
    while batch := list(itertools.islice(clips, size)):
        rows = [clip.samples for clip in batch]
        rows += rows[-1:] * (size - len(rows) if fill else 0)
        compiled, start_s = Compilations.count, time.perf_counter()
        ids = _generate(model, rows, asked)
        yield Ended(
            rows=list(zip(batch, ids, strict=False)),  # rows beyond the clips are filling
            audio_s=sum(len(clip.samples) for clip in batch) / model.sampling_rate,
            seconds=time.perf_counter() - start_s,
            is_compiled=Compilations.count > compiled,
        )
        fill = True


def generation_config(model: SpeechModel, asked: Asked) -> Any:
    """The GenerationConfig of an evaluation, but for the keys of `generation`."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=asked.config.max_new_tokens,
        bos_token_id=model.text_bos_id,
        eos_token_id=asked.stop_ids or None,
        pad_token_id=model.text_pad_id,
    )


def _generate(model: SpeechModel, rows: Sequence[np.ndarray], asked: Asked) -> list[np.ndarray]:
    lengths = np.array([len(row) for row in rows], np.int32)
    audios = np.zeros((len(rows), lengths.max()), np.float32)
    for padded, row in zip(audios, rows, strict=True):
        padded[: len(row)] = row
    answers = model.generate(
        prompts=[asked.prompt] * len(rows),
        audios=audios,
        audio_lens=lengths,
        generation_config=generation_config(model, asked),
        max_audio_s=False,  # what is too long is in chunks already
        **asked.config.generation,
    )
    return [np.asarray(row) for row in answers]
