"""Clips in, ids out: how an evaluation asks its model."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.read_audio import EvaluationClip


@runtime_checkable
class GeneratingModel(Protocol):
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

    rows: list[tuple[EvaluationClip, np.ndarray]]
    """With the ids of each answer."""
    audio_s: float
    seconds: float
    """Of the model, reading excluded."""
    compiled: int
    """Programs that were compiled meanwhile."""


@runtime_checkable
class StreamingModel(GeneratingModel, Protocol):
    """A model that can answer prompts as slots become free."""

    def generate_each(self, prompts: Iterable[Any], **options: Any) -> Iterator[list[Any]]:
        """Rounds of (number of the prompt, ids)."""
        ...


def generate_clips(
    model: GeneratingModel, clips: Iterator[EvaluationClip], asked: Asked
) -> Iterator[Ended]:
    """Answers clips on slots; in batches where that is asked, or the way of answering needs it."""
    if isinstance(model, StreamingModel) and _can_stream(asked.config):
        return in_slots(model, clips, asked)
    return in_batches(model, clips, asked)


def _can_stream(config: EvalConfig) -> bool:
    from speechlm2_jax.inference.continuous_batching import why_unsupported
    from speechlm2_jax.inference.request.generation_request import ANY_VOCABULARY, read_request

    if not config.continuous_batching:
        return False
    return why_unsupported(read_request(ANY_VOCABULARY, dict(config.generation))) is None


def in_slots(
    model: StreamingModel, clips: Iterator[EvaluationClip], asked: Asked
) -> Iterator[Ended]:
    """Answers clips on `batch_size` slots."""
    waiting: dict[int, EvaluationClip] = {}
    reading_s, latest = 0.0, 0

    def dialogs() -> Iterator[list[dict[str, Any]]]:
        nonlocal reading_s, latest
        for number in itertools.count():
            start_s = time.perf_counter()
            clip = next(clips, None)
            reading_s += time.perf_counter() - start_s
            if clip is None:
                return
            waiting[number], latest = clip, clip.draw
            *before, request = asked.prompt
            yield [*before, {**request, "audio": [clip.samples]}]

    def draws() -> Iterator[int]:
        while True:
            yield latest  # of the dialog that was just taken

    drawn = {"draw_numbers": draws()} if asked.config.generation.get("do_sample") else {}
    compiled, start_s = Compilations.count, time.perf_counter()
    for answered in model.generate_each(
        dialogs(),
        slots=asked.config.batch_size,
        generation_config=generation_config(model, asked),
        max_audio_s=False,  # what is too long is in chunks already
        **asked.config.generation,
        **drawn,
    ):
        seconds = time.perf_counter() - start_s - reading_s
        rows = [(waiting.pop(number), ids) for number, ids in answered]
        yield Ended(
            rows=rows,
            audio_s=sum(len(clip.samples) for clip, _ in rows) / model.sampling_rate,
            seconds=seconds,
            compiled=Compilations.count - compiled,
        )
        compiled, start_s, reading_s = Compilations.count, time.perf_counter(), 0.0


def in_batches(
    model: GeneratingModel, clips: Iterator[EvaluationClip], asked: Asked
) -> Iterator[Ended]:
    """Answers `batch_size` clips at a time; a short batch after others repeats its last clip."""
    size, fill = asked.config.batch_size, False
    while batch := list(itertools.islice(clips, size)):
        filled = batch + batch[-1:] * (size - len(batch) if fill else 0)
        compiled, start_s = Compilations.count, time.perf_counter()
        ids = _generate(model, filled, asked)
        yield Ended(
            rows=list(zip(batch, ids, strict=False)),  # rows beyond the clips are filling
            audio_s=sum(len(clip.samples) for clip in batch) / model.sampling_rate,
            seconds=time.perf_counter() - start_s,
            compiled=Compilations.count - compiled,
        )
        fill = True


def generation_config(model: GeneratingModel, asked: Asked) -> Any:
    """The GenerationConfig of an evaluation, but for the keys of `generation`."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=asked.config.max_new_tokens,
        bos_token_id=model.text_bos_id,
        eos_token_id=asked.stop_ids or None,
        pad_token_id=model.text_pad_id,
    )


def _generate(
    model: GeneratingModel, clips: Sequence[EvaluationClip], asked: Asked
) -> list[np.ndarray]:
    rows = [clip.samples for clip in clips]
    is_drawn = asked.config.generation.get("do_sample")
    drawn = {"draw_numbers": [clip.draw for clip in clips]} if is_drawn else {}
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
        **drawn,
    )
    return [np.asarray(row) for row in answers]
