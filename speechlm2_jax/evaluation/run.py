"""Answers every utterance in batches of a fixed size, and scores the answers."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.generate import Asked, GeneratingModel, generate_clips
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.journal import Journal, row_keys
from speechlm2_jax.evaluation.metrics.wer import text_normalizer, word_errors
from speechlm2_jax.evaluation.progress import ProgressDisplay
from speechlm2_jax.evaluation.read_audio import EvaluationClip, clips
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from speechlm2_jax.inference.long_form.join_texts import join
from speechlm2_jax.settings import SettingsError, build, to_plain

Log = Callable[[str], None]


def evaluate(
    model: GeneratingModel,
    utterances: Sequence[Utterance],
    config: EvalConfig,
    log: Log = tqdm.write,
    journal: Journal | None = None,
) -> Evaluation:
    """Answers the utterances, longest first, and returns the answers in input order.

    A recording that is longer than `config.max_audio_s` is answered in chunks, which is logged; one
    that cannot be read becomes an answer with its error, and the others go on. With a `journal`
    each answer is written as it ends, and what that has already is not answered again. Raises
    SettingsError if an extra end token is not in the vocabulary.
    """
    Compilations.listen()
    asked = Asked(make_prompt(model, config), end_ids(model, config), config)
    answers, speed = ({}, Speed()) if journal is None else _resumed(journal, utterances)
    texts: dict[int, dict[int, str]] = {}

    def ended(whole: Mapping[int, Response]) -> None:
        answers.update(whole)
        if journal is not None:
            kept = to_plain(speed)
            journal.append(
                {i: (a.row(config.use_normalizer), _progress(a, kept)) for i, a in whole.items()}
            )
        progress.update(len(whole))

    def failed(index: int, error: AudioError) -> None:
        log(f"skipped {utterances[index].id}: {error}")
        ended({index: _failure(utterances[index], error)})

    with ProgressDisplay(len(utterances), len(answers)) as progress:
        heard = _clips(model, utterances, config, failed, log, frozenset(answers))
        for round in generate_clips(model, heard, asked):
            speed = speed.add(round.audio_s, round.seconds, compiled=round.compiled)
            whole = {}
            for clip, ids in round.rows:
                said = texts.setdefault(clip.index, {})
                said[clip.number] = _text(model, ids, asked.stop_ids)
                if len(said) == len(clip.chunks):
                    text = join([said[n] for n in range(len(said))], clip.chunks)
                    duration_s = clip.recording_samples / model.sampling_rate
                    rtf = round.seconds / round.audio_s
                    whole[clip.index] = _answer(utterances[clip.index], text, duration_s, rtf)
            _show(list(whole.values()), round.audio_s / round.seconds, config, log)
            ended(whole)
    return Evaluation(
        answers=tuple(answers[i] for i in range(len(utterances))),
        speed=speed,
        normalizer=config.use_normalizer,
    )


def input_keys(utterances: Sequence[Utterance]) -> list[str]:
    """What tells the utterances of a journal apart."""
    return row_keys([(u.id, u.source, u.duration_s, u.text, u.audio_of) for u in utterances])


def _progress(answer: Response, speed: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the output manifest does not say of an answer."""
    return {"rtf": answer.rtf, "speed": speed}


def _resumed(
    journal: Journal, utterances: Sequence[Utterance]
) -> tuple[dict[int, Response], Speed]:
    """The answers that a journal has; what could not be read before is tried again."""
    journal.forget([index for index, kept in journal.kept.items() if "error" in kept.row])
    answers, speed = {}, Speed()
    for index, kept in journal.kept.items():
        speed = max(speed, build(Speed, kept.progress["speed"]), key=lambda s: s.generate_s)
        answers[index] = replace(
            _unanswered(utterances[index]),
            duration_s=kept.row["duration"],
            pred_text=kept.row["pred_text_raw"],
            rtf=kept.progress["rtf"],
        )
    return answers, speed


def _clips(
    model: GeneratingModel,
    utterances: Sequence[Utterance],
    config: EvalConfig,
    failed: Callable[[int, AudioError], None],
    log: Log,
    answered: Container[int],
) -> Iterator[EvaluationClip]:
    """Clips one after the other; failures are told, and recordings that are cut."""
    for found in clips(
        utterances,
        ahead=config.batch_size,
        rate_hz=model.sampling_rate,
        max_s=config.max_audio_s,
        answered=answered,
    ):
        if isinstance(found, tuple):
            failed(*found)
            continue
        if len(found) > 1:
            seconds = found[0].recording_samples / model.sampling_rate
            log(
                f"{utterances[found[0].index].id}: {seconds:.1f} s are more than "
                f"max_audio_s={config.max_audio_s:g}; answered in {len(found)} overlapping chunks"
            )
        yield from found


def make_prompt(model: GeneratingModel, config: EvalConfig) -> list[dict[str, str]]:
    """The dialog asked of every utterance: system turn if any, then the request and the audio."""
    request = config.user_prompt or ""
    if model.audio_locator_tag not in request:
        request = f"{request} {model.audio_locator_tag}".strip()
    system = [] if config.system_prompt is None else [config.system_prompt]
    turns = [{"role": "system", "content": text} for text in system]
    return [*turns, {"role": "user", "content": request}]


def end_ids(model: GeneratingModel, config: EvalConfig) -> list[int]:
    """Ids that end an answer. Raises SettingsError for an extra token that it lacks."""
    ids = [] if model.text_eos_id is None else [int(model.text_eos_id)]
    for token in config.extra_eos_tokens or ():
        try:
            ids.append(model.tokenizer.require(token, "extra_eos_tokens"))
        except ValueError as error:
            raise SettingsError(str(error)) from error
    return ids


def _failure(utterance: Utterance, error: AudioError) -> Response:
    return replace(_unanswered(utterance), error=str(error), cause=error.cause)


def _unanswered(utterance: Utterance) -> Response:
    return Response(
        id=utterance.id,
        duration_s=utterance.duration_s,
        text=utterance.text,
        pred_text="",
        voice=utterance.voice,
        is_unseen=utterance.is_unseen,
        condition=utterance.condition,
        audio_of=utterance.audio_of,
    )


def _text(model: GeneratingModel, ids: np.ndarray, stop_ids: Sequence[int]) -> str:
    """What was said before the first end token."""
    ends = np.flatnonzero(np.isin(ids, stop_ids))
    spoken = ids[: ends[0]] if len(ends) else ids
    return model.tokenizer.ids_to_text([int(i) for i in spoken]).strip()


def _answer(utterance: Utterance, text: str, duration_s: float, rtf: float) -> Response:
    return replace(
        _unanswered(utterance),
        duration_s=utterance.duration_s or duration_s,
        pred_text=text,
        rtf=rtf,
    )


def _show(answers: Sequence[Response], rtfx: float, config: EvalConfig, log: Log) -> None:
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
