"""Audio clips in, token ids out: how an evaluation calls `model.generate`."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.prompts.prompt import Turn
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.read_audio import EvaluationClip


@runtime_checkable
class EvaluatedModel(Protocol):
    """What an evaluation needs of a model; `speechlm2_jax.models.SALM` is one."""

    tokenizer: Tokenizer
    prompt_formatter: PromptFormatter
    audio_locator_tag: str
    sampling_rate: int
    text_bos_id: int | None
    text_eos_id: int | None
    text_pad_id: int

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Generated token ids, one sequence per prompt."""
        ...


@dataclass(frozen=True)
class GenerationTask:
    """The prompt of every recording, and how to generate."""

    prompt: list[dict[str, str]]
    """Conversations have their own."""
    stop_ids: list[int]
    config: EvalConfig
    draft_model: Any = None
    """The ASR model whose transcripts are drafts, if any."""


@dataclass(frozen=True, kw_only=True)
class GeneratedRound:
    """Clips whose generation ended together: one batch, or one round of continuous batching."""

    outputs: list[tuple[EvaluationClip, Int[np.ndarray, " T"]]]
    """Each clip with its generated token ids."""
    audio_s: float
    seconds: float
    """Time of the model, without reading audio."""
    compiled: int
    """Number of programs compiled in this round."""
    drafted: int = 0
    """Draft tokens that were checked."""
    accepted: int = 0
    """Draft tokens that are part of the responses."""


@runtime_checkable
class StreamingModel(EvaluatedModel, Protocol):
    """A model with continuous batching."""

    def generate_each(self, prompts: Iterable[Any], **options: Any) -> Iterator[list[Any]]:
        """Yields rounds of `FinishedPrompt`: (index of the prompt, token ids)."""
        ...


def generate_clips(
    model: EvaluatedModel, clips: Iterator[EvaluationClip], task: GenerationTask
) -> Iterator[GeneratedRound]:
    """Generates for each clip, with continuous batching where config and decoding allow it."""
    if isinstance(model, StreamingModel) and _can_stream(model, task.config):
        return generate_continuously(model, clips, task)
    return generate_in_batches(model, clips, task)


def _can_stream(model: EvaluatedModel, config: EvalConfig) -> bool:
    from speechlm2_jax.inference.continuous_batching import why_unsupported
    from speechlm2_jax.inference.request.generation_request import (
        ANY_VOCABULARY,
        Vocabulary,
        read_request,
    )

    if not config.continuous_batching:
        return False
    vocabulary = model if isinstance(model, Vocabulary) else ANY_VOCABULARY
    return why_unsupported(read_request(vocabulary, dict(config.generation))) is None


def generate_continuously(
    model: StreamingModel, clips: Iterator[EvaluationClip], task: GenerationTask
) -> Iterator[GeneratedRound]:
    """Continuous batching on `batch_size` slots."""
    pending: dict[int, EvaluationClip] = {}
    reading_s, latest = 0.0, 0

    def prompts() -> Iterator[list[Turn]]:
        nonlocal reading_s, latest
        for number in itertools.count():
            start_s = time.perf_counter()
            clip = next(clips, None)
            reading_s += time.perf_counter() - start_s
            if clip is None:
                return
            pending[number], latest = clip, clip.draw
            yield _prompt(model, clip, task)

    def draws() -> Iterator[int]:
        while True:
            yield latest  # generate_each takes a prompt, then its draw number

    drawn: dict[str, Any] = {}
    if task.config.generation.get("do_sample"):
        drawn["draw_numbers"] = draws()
    if task.draft_model is not None:
        drawn["assistant_model"] = task.draft_model
    counts_drafts = task.config.is_speculative
    compiled, start_s = Compilations.count, time.perf_counter()
    for finished in model.generate_each(
        prompts(),
        slots=task.config.batch_size,
        generation_config=generation_config(model, task),
        max_audio_s=False,  # long recordings are chunked already
        **task.config.generation,
        **drawn,
    ):
        seconds = time.perf_counter() - start_s - reading_s
        outputs = [(pending.pop(number), ids) for number, ids in finished]
        yield GeneratedRound(
            outputs=outputs,
            audio_s=_audio_s(model, [clip for clip, _ in outputs]),
            seconds=seconds,
            compiled=Compilations.count - compiled,
            drafted=sum(f.drafted for f in finished) if counts_drafts else 0,
            accepted=sum(f.accepted for f in finished) if counts_drafts else 0,
        )
        compiled, start_s, reading_s = Compilations.count, time.perf_counter(), 0.0


def generate_in_batches(
    model: EvaluatedModel, clips: Iterator[EvaluationClip], task: GenerationTask
) -> Iterator[GeneratedRound]:
    """Plain batches of `batch_size` clips.

    A short last batch is filled up by repeating its last clip, so that no new shape is compiled.
    """
    size, fill = task.config.batch_size, False
    while batch := list(itertools.islice(clips, size)):
        filled = batch + batch[-1:] * (size - len(batch) if fill else 0)
        compiled, start_s = Compilations.count, time.perf_counter()
        ids, drafted, accepted = _generate(model, filled, task)
        yield GeneratedRound(
            outputs=list(zip(batch, ids, strict=False)),  # drops the outputs of the filling
            audio_s=_audio_s(model, batch),
            seconds=time.perf_counter() - start_s,
            compiled=Compilations.count - compiled,
            drafted=int(drafted[: len(batch)].sum()),
            accepted=int(accepted[: len(batch)].sum()),
        )
        fill = True


def generation_config(model: EvaluatedModel, task: GenerationTask) -> Any:
    """The GenerationConfig without the keys of `generation`, which are passed as arguments."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=task.config.max_new_tokens,
        bos_token_id=model.text_bos_id,
        eos_token_id=task.stop_ids or None,
        pad_token_id=model.text_pad_id,
    )


def _generate(
    model: EvaluatedModel, clips: Sequence[EvaluationClip], task: GenerationTask
) -> tuple[list[Int[np.ndarray, " T"]], Int[np.ndarray, "..."], Int[np.ndarray, "..."]]:
    """(token ids, draft tokens checked, draft tokens accepted) of each clip."""
    is_drawn = task.config.generation.get("do_sample")
    drawn: dict[str, Any] = {"draw_numbers": [clip.draw for clip in clips]} if is_drawn else {}
    if any(clip.dialog is not None for clip in clips):
        prompts = [_prompt(model, clip, task) for clip in clips]
        audio = {}
    else:
        prompts = [task.prompt] * len(clips)
        audio = dict(
            zip(("audios", "audio_lens"), pad_right([c.samples for c in clips]), strict=True)
        )
    if task.draft_model is not None:
        drawn["assistant_model"] = task.draft_model
    if task.config.is_speculative:
        drawn["return_dict_in_generate"] = True
    generated = model.generate(
        prompts=prompts,
        **audio,
        generation_config=generation_config(model, task),
        max_audio_s=False,  # long recordings are chunked already
        **task.config.generation,
        **drawn,
    )
    # as in NeMo, the output starts with the prompt if no prompt has audio
    has_audio = audio or any(clip.recordings or clip.dialog is None for clip in clips)
    own = 0 if has_audio else max(_prompt_tokens(model, prompt) for prompt in prompts)
    if not task.config.is_speculative:
        none = np.zeros(len(clips), np.int32)
        return [np.asarray(ids)[own:] for ids in generated], none, none
    sequences = [np.asarray(ids)[own:] for ids in generated.sequences]
    return sequences, np.asarray(generated.drafted), np.asarray(generated.accepted)


def _prompt(model: EvaluatedModel, clip: EvaluationClip, task: GenerationTask) -> list[Turn]:
    """The prompt of one clip, its audio inside."""
    if clip.dialog is None:
        *before, request = task.prompt
        return [*before, {**request, "audio": [clip.samples]}]
    turns = model.prompt_formatter.dialog(clip.dialog.messages(model.audio_locator_tag))
    return [*turns[:-1], {**turns[-1], "audio": list(clip.recordings)}]


def _prompt_tokens(model: EvaluatedModel, prompt: Sequence[Turn]) -> int:
    turns = [{key: value for key, value in turn.items() if key != "audio"} for turn in prompt]
    return len(model.prompt_formatter.encode_dialog(turns).input_ids)


def _audio_s(model: EvaluatedModel, clips: Sequence[EvaluationClip]) -> float:
    return sum(len(clip.samples) for clip in clips) / model.sampling_rate
