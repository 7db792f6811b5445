"""Answers every utterance in batches of a fixed size, and scores the answers."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.report import Answer, Evaluation, Speed
from speechlm2_jax.evaluation.wer import text_normalizer, word_errors
from speechlm2_jax.settings import SettingsError

READERS = 4
Log = Callable[[str], None]


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


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A recording that was read, and its place among the inputs."""

    index: int
    samples: np.ndarray


def evaluate(
    model: SpeechModel, utterances: Sequence[Utterance], config: EvalConfig, log: Log = tqdm.write
) -> Evaluation:
    """Answers the utterances, longest first, and returns the answers in input order.

    A recording that cannot be read becomes an answer with its error; the others go on. Raises
    SettingsError if an extra end token is not in the vocabulary.
    """
    Compilations.listen()
    prompt, stop_ids = make_prompt(model, config), end_ids(model, config)
    answers: dict[int, Answer] = {}
    speed = Speed()
    progress = tqdm(total=len(utterances), unit="utt", disable=None)
    for clips, failures in _batches(utterances, config.batch_size, model.sampling_rate):
        answers |= failures
        for failure in failures.values():
            log(f"skipped {failure.id}: {failure.error}")
        if clips:
            compiled, start = Compilations.count, time.perf_counter()
            ids = _generate(model, clips, prompt, stop_ids, config, fill=speed.generate_s > 0)
            elapsed = time.perf_counter() - start
            audio_s = sum(len(c.samples) for c in clips) / model.sampling_rate
            speed = speed.add(audio_s, elapsed, compiled=Compilations.count > compiled)
            rtf = elapsed / audio_s
            batch = {
                clip.index: _answer(model, utterances[clip.index], clip, row, stop_ids, rtf)
                for clip, row in zip(clips, ids, strict=False)  # rows beyond the clips are filling
            }
            answers |= batch
            _show(list(batch.values()), audio_s / elapsed, config, log)
        progress.update(len(clips) + len(failures))
    progress.close()
    return Evaluation(
        answers=tuple(answers[i] for i in range(len(utterances))),
        speed=speed,
        normalizer=config.use_normalizer,
    )


def make_prompt(model: SpeechModel, config: EvalConfig) -> list[dict[str, str]]:
    """The dialog asked of every utterance: system turn if any, then the request and the audio."""
    request = config.user_prompt or ""
    if model.audio_locator_tag not in request:
        request = f"{request} {model.audio_locator_tag}".strip()
    system = [] if config.system_prompt is None else [config.system_prompt]
    turns = [{"role": "system", "content": text} for text in system]
    return [*turns, {"role": "user", "content": request}]


def end_ids(model: SpeechModel, config: EvalConfig) -> list[int]:
    """Ids that end an answer. Raises SettingsError for an extra token that it lacks."""
    ids = [] if model.text_eos_id is None else [int(model.text_eos_id)]
    for token in config.extra_eos_tokens or ():
        try:
            ids.append(model.tokenizer.require(token, "extra_eos_tokens"))
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return ids


def _batches(
    utterances: Sequence[Utterance], size: int, rate_hz: int
) -> Iterator[tuple[list[_Clip], dict[int, Answer]]]:
    """Batches of readable clips, longest first, the next one read while this one is answered."""
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration_s)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    with ThreadPoolExecutor(READERS) as pool:
        ahead = [_submit(pool, utterances, chunk, rate_hz) for chunk in chunks[:1]]
        for number, chunk in enumerate(chunks):
            futures = ahead.pop()
            ahead = [_submit(pool, utterances, c, rate_hz) for c in chunks[number + 1 : number + 2]]
            clips: list[_Clip] = []
            failures: dict[int, Answer] = {}
            for index, future in zip(chunk, futures, strict=True):
                try:
                    clips.append(_Clip(index=index, samples=future.result()))
                except AudioError as error:
                    failures[index] = _failure(utterances[index], error)
            yield clips, failures


def _submit(
    pool: ThreadPoolExecutor, utterances: Sequence[Utterance], chunk: Sequence[int], rate_hz: int
) -> list[Future[np.ndarray]]:
    return [pool.submit(utterances[i].read, rate_hz) for i in chunk]


def _failure(utterance: Utterance, error: AudioError) -> Answer:
    return replace(_unanswered(utterance), error=str(error), cause=error.cause)


def _unanswered(utterance: Utterance) -> Answer:
    return Answer(
        id=utterance.id,
        duration_s=utterance.duration_s,
        text=utterance.text,
        pred_text="",
        voice=utterance.voice,
        is_unseen=utterance.is_unseen,
        condition=utterance.condition,
        audio_of=utterance.audio_of,
    )


def _generate(
    model: SpeechModel,
    clips: Sequence[_Clip],
    prompt: list[dict[str, str]],
    stop_ids: list[int],
    config: EvalConfig,
    *,
    fill: bool,
) -> list[np.ndarray]:
    """Ids per clip. With `fill`, a short batch repeats its last clip: no new shape is compiled."""
    from transformers import GenerationConfig

    rows = [clip.samples for clip in clips]
    rows += rows[-1:] * (config.batch_size - len(rows) if fill else 0)
    lengths = np.array([len(row) for row in rows], np.int32)
    audios = np.zeros((len(rows), lengths.max()), np.float32)
    for padded, row in zip(audios, rows, strict=True):
        padded[: len(row)] = row
    answers = model.generate(
        prompts=[prompt] * len(rows),
        audios=audios,
        audio_lens=lengths,
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            bos_token_id=model.text_bos_id,
            eos_token_id=stop_ids or None,
            pad_token_id=model.text_pad_id,
        ),
        **config.generation,
    )
    return [np.asarray(row) for row in answers]


def _answer(
    model: SpeechModel,
    utterance: Utterance,
    clip: _Clip,
    ids: np.ndarray,
    stop_ids: list[int],
    rtf: float,
) -> Answer:
    ends = np.flatnonzero(np.isin(ids, stop_ids))
    spoken = ids[: ends[0]] if len(ends) else ids
    return replace(
        _unanswered(utterance),
        duration_s=utterance.duration_s or len(clip.samples) / model.sampling_rate,
        pred_text=model.tokenizer.ids_to_text([int(i) for i in spoken]).strip(),
        rtf=rtf,
    )


def _show(answers: Sequence[Answer], rtfx: float, config: EvalConfig, log: Log) -> None:
    """Prints transcripts where there is nothing to score, else (verbose) both texts and errors."""
    normalize = text_normalizer(config.use_normalizer)
    scored = [a for a in answers if a.text is not None]
    for answer in answers:
        if answer.text is None:
            log(f"{answer.id}: {answer.pred_text}")
        elif config.verbose:
            log(f"{answer.id}\n  reference: {answer.text}\n  answer:    {answer.pred_text}")
    if scored and config.verbose:
        errors = word_errors(
            [normalize(str(a.text)) for a in scored], [normalize(a.pred_text) for a in scored]
        )
        wer = "n/a" if errors.wer is None else f"{errors.wer:.2%}"
        log(
            f"batch of {len(answers)}: WER {wer} (insertions {errors.insertions}, deletions "
            f"{errors.deletions}, substitutions {errors.substitutions}), RTFx {rtfx:.1f}"
        )
