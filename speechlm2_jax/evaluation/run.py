"""Evaluation loop of SALM: generates a response to every utterance and collects the results."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.generate import EvaluatedModel, GenerationTask, generate_clips
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.journal import Journal, row_keys
from speechlm2_jax.evaluation.metrics.wer import merges_compounds, text_normalizer, word_errors
from speechlm2_jax.evaluation.progress import ProgressDisplay
from speechlm2_jax.evaluation.read_audio import EvaluationClip, clips, longest_first
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from speechlm2_jax.evaluation.resuming import speed_of
from speechlm2_jax.evaluation.split import left_out
from speechlm2_jax.inference.long_form.join_texts import join
from speechlm2_jax.inference.request.values import ids_of
from speechlm2_jax.settings import SettingsError, to_plain

Log = Callable[[str], None]


def evaluate(
    model: EvaluatedModel,
    utterances: Sequence[Utterance],
    config: EvalConfig,
    log: Log = tqdm.write,
    journal: Journal | None = None,
    *,
    is_joint: bool = False,
    draft_model: Any = None,
) -> Evaluation:
    """Generates a response to each utterance, longest first; returns them in input order.

    - A recording longer than `config.max_audio_s` is processed in chunks, which is logged.
    - A recording that cannot be read becomes a response with an `error`; the others continue.
    - A `journal` is written response by response; the responses that it holds are not generated
      again. If it has a part of a split evaluation, the responses of this part are returned.
    - The transcripts of `draft_model` are drafts of speculative decoding.
    - With `is_joint` all processes generate each response together, and do the same.

    Raises SettingsError if the vocabulary lacks one of `extra_eos_tokens`.
    """
    Compilations.start()
    task = GenerationTask(make_prompt(model, config), end_ids(model, config), config, draft_model)
    part = None if journal is None else journal.part
    responses, speed = ({}, Speed()) if journal is None else _resumed(journal, utterances)
    speed = speed if part is None else Speed()  # each process counts its own
    order = longest_first([u.duration_s for u in utterances])
    done = left_out(responses, order, part, is_joint=is_joint)
    texts: dict[int, dict[int, str]] = {}  # utterance -> chunk -> text

    def record(finished: Mapping[int, Response]) -> None:
        responses.update(finished)
        if journal is not None:
            saved = {"speed": to_plain(speed), **({} if part is None else {"part": part.name})}
            journal.append(
                {
                    i: (response.row(config.use_normalizer), {"rtf": response.rtf, **saved})
                    for i, response in finished.items()
                }
            )
        progress.update(len(finished) + (0 if part is None else part.done_by_others()))

    def failed(index: int, error: AudioError) -> None:
        log(f"skipped {utterances[index].id}: {error}")
        record({index: _failure(utterances[index], error)})

    with ProgressDisplay(len(utterances), len(responses)) as progress:
        todo = _clips(model, utterances, config, failed, log, done)
        for round in generate_clips(model, todo, task):
            speed = speed.add(round.audio_s, round.seconds, compiled=round.compiled)
            speed = speed.add_drafts(round.drafted, round.accepted)
            rtf = round.seconds / round.audio_s if round.audio_s else None
            finished = {}
            for clip, ids in round.outputs:
                chunk_texts = texts.setdefault(clip.index, {})
                chunk_texts[clip.number] = _text(model, ids, task.stop_ids)
                if len(chunk_texts) == len(clip.chunks):
                    text = join([chunk_texts[n] for n in range(len(chunk_texts))], clip.chunks)
                    duration_s = clip.recording_samples / model.sampling_rate
                    finished[clip.index] = _response(utterances[clip.index], text, duration_s, rtf)
            _show(list(finished.values()), round.audio_s / round.seconds, config, log)
            record(finished)
        if part is not None:
            part.wait(progress.update)
    return Evaluation(
        responses=tuple(responses[i] for i in sorted(responses)),
        speed=speed,
        normalizer=config.use_normalizer,
        metrics=config.metrics,
    )


def input_keys(utterances: Sequence[Utterance]) -> list[str]:
    """The journal's key of each utterance."""
    return row_keys([(u.id, u.source, u.duration_s, u.text, u.audio_of) for u in utterances])


def _resumed(
    journal: Journal, utterances: Sequence[Utterance]
) -> tuple[dict[int, Response], Speed]:
    """The responses that a journal holds. Recordings that could not be read are tried again."""
    journal.forget([index for index, kept in journal.kept.items() if "error" in kept.row])
    responses = {}
    for index, kept in journal.kept.items():
        responses[index] = replace(
            _empty_response(utterances[index]),
            duration_s=kept.row["duration"],
            pred_text=kept.row["pred_text_raw"],
            rtf=kept.progress["rtf"],
        )
    return responses, speed_of(journal.kept.values())


def _clips(
    model: EvaluatedModel,
    utterances: Sequence[Utterance],
    config: EvalConfig,
    failed: Callable[[int, AudioError], None],
    log: Log,
    done: Container[int],
) -> Iterator[EvaluationClip]:
    """The clips to process; reports failures, logs recordings that are split into chunks."""
    for found in clips(
        utterances,
        ahead=config.batch_size,
        rate_hz=model.sampling_rate,
        max_s=config.max_audio_s,
        done=done,
    ):
        if isinstance(found, tuple):
            failed(*found)
            continue
        if len(found) > 1:
            seconds = found[0].recording_samples / model.sampling_rate
            log(
                f"{utterances[found[0].index].id}: {seconds:.1f} s are more than "
                f"max_audio_s={config.max_audio_s:g}; split into {len(found)} overlapping chunks"
            )
        yield from found


def make_prompt(model: EvaluatedModel, config: EvalConfig) -> list[dict[str, str]]:
    """The prompt of every utterance: the system turn if any, then user prompt and audio."""
    request = config.user_prompt or ""
    if model.audio_locator_tag not in request:
        request = f"{request} {model.audio_locator_tag}".strip()
    system = [] if config.system_prompt is None else [config.system_prompt]
    turns = [{"role": "system", "content": text} for text in system]
    return [*turns, {"role": "user", "content": request}]


def end_ids(model: EvaluatedModel, config: EvalConfig) -> list[int]:
    """Ids of the end tokens. Raises SettingsError if the vocabulary lacks an extra one."""
    own = getattr(model, "end_ids", None) or ids_of(model.text_eos_id)
    ids = [int(index) for index in own]
    for token in config.extra_eos_tokens or ():
        try:
            ids.append(model.tokenizer.require(token, "extra_eos_tokens"))
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return ids


def _failure(utterance: Utterance, error: AudioError) -> Response:
    return replace(_empty_response(utterance), error=str(error), cause=error.cause)


def _empty_response(utterance: Utterance) -> Response:
    return Response(
        id=utterance.id,
        duration_s=utterance.duration_s,
        text=utterance.text,
        pred_text="",
        voice=utterance.voice,
        is_unseen=utterance.is_unseen,
        is_seen_text=utterance.is_seen_text,
        is_seen_audio=utterance.is_seen_audio,
        condition=utterance.condition,
        audio_of=utterance.audio_of,
        dialog=utterance.dialog,
    )


def _text(model: EvaluatedModel, ids: Int[np.ndarray, " T"], stop_ids: Sequence[int]) -> str:
    """The text before the first end token."""
    ends = np.flatnonzero(np.isin(ids, stop_ids))
    kept = ids[: ends[0]] if len(ends) else ids
    return model.tokenizer.ids_to_text([int(i) for i in kept]).strip()


def _response(utterance: Utterance, text: str, duration_s: float, rtf: float | None) -> Response:
    return replace(
        _empty_response(utterance),
        duration_s=utterance.duration_s or duration_s,
        pred_text=text,
        rtf=rtf,
    )


def _show(responses: Sequence[Response], rtfx: float, config: EvalConfig, log: Log) -> None:
    """Prints responses without a reference; if verbose also pairs of texts and word errors."""
    normalize = text_normalizer(config.use_normalizer)
    scored = [r for r in responses if r.text is not None]
    for response in responses:
        if response.text is None:
            log(f"{response.id}: {response.pred_text}")
        elif config.verbose:
            log(f"{response.id}\n  reference:  {response.text}\n  hypothesis: {response.pred_text}")
    if scored and config.verbose:
        errors = word_errors(
            [normalize(str(r.text)) for r in scored],
            [normalize(r.pred_text) for r in scored],
            merge_compounds=merges_compounds(config.use_normalizer),
        )
        wer = "n/a" if errors.wer is None else f"{errors.wer:.2%}"
        log(
            f"batch of {len(responses)}: WER {wer} (insertions {errors.insertions}, deletions "
            f"{errors.deletions}, substitutions {errors.substitutions}), RTFx {rtfx:.1f}"
        )
