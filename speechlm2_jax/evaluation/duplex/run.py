"""Evaluation loop of duplex models: runs the model on every conversation and scores it."""

import contextlib
import itertools
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from speechlm2_jax.batches import DuplexExample
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.read_ahead import read_ahead
from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.duplex import scoring
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.duplex.events import events_of
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.outputs import OutputFiles
from speechlm2_jax.evaluation.duplex.results import DialogueResult, DuplexEvaluation
from speechlm2_jax.evaluation.duplex.scoring import (
    FIRST_TOKEN_FRAME,
    DuplexResponse,
    DuplexScorer,
    SavedResponse,
)
from speechlm2_jax.evaluation.duplex.turns import TranscribedTurn, text_turns
from speechlm2_jax.evaluation.journal import Journal, row_keys
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, turn_marks
from speechlm2_jax.evaluation.progress import ProgressDisplay
from speechlm2_jax.evaluation.results import Speed
from speechlm2_jax.evaluation.resuming import speed_of
from speechlm2_jax.evaluation.split import left_out
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.settings import build, to_plain

RESULT = "result"
"""Key of a DialogueResult in the `progress` of a journal's row."""
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Conversations of one set by input index: those that were read, and errors of the others."""

    examples: Mapping[int, DuplexExample]
    failures: Mapping[int, AudioError]


def open_scorer(
    model: DuplexS2SModel, config: DuplexEvalConfig, *, keeps_audio: bool
) -> DuplexScorer:
    """Makes the scorer, and loads the scoring ASR model if there is one.

    Raises SettingsError or ConversionError if it cannot be loaded.
    """
    return scoring.open_scorer(
        model,
        config.scoring_asr,
        keeps_audio=keeps_audio,
        counts_tokens=True,
        normalizer=config.use_normalizer,
    )


def evaluate_duplex(
    scorer: DuplexScorer,
    dialogues: Sequence[Dialogue],
    dataset: DuplexS2SDataset,
    config: DuplexEvalConfig,
    audio_folder: Path | None,
    log: Log = tqdm.write,
    journal: Journal | None = None,
    *,
    is_joint: bool = False,
) -> DuplexEvaluation:
    """Runs the model on the conversations, set by set, longest first; results in input order.

    - The agent's speech is written to files below `audio_folder`, if that is given.
    - A conversation whose audio cannot be read becomes a result with an `error`.
    - A `journal` is written batch by batch; the results that it holds are not generated again. If
      it has a part of a split evaluation, the results of this part are returned.
    - With `is_joint` all processes generate each response together, and do the same.

    The scorer is closed at the end, which frees its ASR model.
    """
    Compilations.start()
    files = OutputFiles.of(dialogues, audio_folder, config.benchmark_folder, config.input_roles)
    part = None if journal is None else journal.part
    results, speed = _resumed(journal, scorer, files)
    speed = speed if part is None else Speed()  # each process counts its own
    order = [index for chunk in _chunks(dialogues, config.batch_size, ()) for index in chunk]
    done = left_out(results, order, part, is_joint=is_joint)
    if is_joint and jax.process_index():
        files = files.nothing()  # the first process writes what all have generated
    padded_size = 0
    with (
        contextlib.closing(scorer),
        ProgressDisplay(len(dialogues), len(results)) as progress,
    ):
        for batch in _batches(dialogues, dataset, config.batch_size, done):
            rows: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
            for index, error in batch.failures.items():
                results[index] = _failure(dialogues[index], error)
                rows[index] = (results[index].row(config.use_normalizer), {})
                log(f"skipped {dialogues[index].id}: {error}")
            if batch.examples:
                given = (scorer, dialogues, batch.examples, padded_size, speed)
                responses, speed = _generate(*given)
                # from here on short batches are padded: no new shape is compiled
                padded_size = config.batch_size
                for index, (response, rtf) in responses.items():
                    files.write(index, dialogues[index], response, scorer.model)
                    given = (scorer, dialogues[index], response, files.speech.get(index))
                    results[index] = _scored(*given, rtf, config, log)
                    rows[index] = (
                        results[index].row(config.use_normalizer),
                        {
                            **_progress(scorer, results[index], response, speed),
                            **({} if part is None else {"part": part.name}),
                        },
                    )
            if journal is not None:
                journal.append(rows)
            progress.update(len(rows) + (0 if part is None else part.done_by_others()))
        if part is not None:
            part.wait(progress.update)
        scores, silence = scorer.compute(), scorer.silent.compute()
    return DuplexEvaluation(
        results=tuple(results[i] for i in sorted(results)),
        scores=scores,
        silence=silence,
        speed=speed,
    )


def _scored(
    scorer: DuplexScorer,
    dialogue: Dialogue,
    response: DuplexResponse,
    speech: Path | None,
    rtf: float,
    config: DuplexEvalConfig,
    log: Log,
) -> DialogueResult:
    """The result of a conversation, counted in the scores; one without a reference is logged."""
    result = _result(scorer, dialogue, response, speech, rtf, config.input_roles)
    scorer.add_events(result.set_name, result.events)
    if config.verbose or not dialogue.has_reference:
        log(result.summary())
    return result


def input_keys(dialogues: Sequence[Dialogue]) -> list[str]:
    """The journal's key of each conversation."""
    return row_keys([(d.set_name, d.id, d.duration_s, d.has_reference) for d in dialogues])


def _progress(
    scorer: DuplexScorer, result: DialogueResult, response: DuplexResponse, speed: Speed
) -> dict[str, Any]:
    """What resuming needs beside the row of the output manifest."""
    user, agent = scorer.turns_of(response)
    return {
        RESULT: to_plain(result),
        "user": user.segments(),
        "agent": agent.segments(),
        "speed": to_plain(speed),
    }


def _resumed(
    journal: Journal | None, scorer: DuplexScorer, files: OutputFiles
) -> tuple[dict[int, DialogueResult], Speed]:
    """The results that a journal holds; adds them to the scorer.

    Conversations that could not be read, or whose speech file is missing, are generated again.
    """
    results: dict[int, DialogueResult] = {}
    if journal is None:
        return results, Speed()
    journal.forget(
        [
            index
            for index, kept in journal.kept.items()
            if "error" in kept.row
            or RESULT not in kept.progress  # written by an older version
            or files.are_lost(index)
        ]
    )
    for index, kept in journal.kept.items():
        result = build(DialogueResult, kept.progress[RESULT])
        results[index] = result
        scorer.add_saved(
            result.set_name,
            SavedResponse(
                reference=result.text,
                text=result.pred_text,
                asr_text=result.asr_text,
                user=Turns.from_segments(map(tuple, kept.progress["user"])),
                agent=Turns.from_segments(map(tuple, kept.progress["agent"])),
                counts=result.counts,
            ),
        )
        scorer.add_events(result.set_name, result.events)
    return results, speed_of(journal.kept.values())


def _generate(
    scorer: DuplexScorer,
    dialogues: Sequence[Dialogue],
    examples: Mapping[int, DuplexExample],
    batch_size: int,
    speed: Speed,
) -> tuple[dict[int, tuple[DuplexResponse, float]], Speed]:
    """Responses by input index, each with its real-time factor, and the updated speed."""
    first, model = dialogues[next(iter(examples))], scorer.model
    compiled, start = Compilations.count, time.perf_counter()
    result = scorer.generate(list(examples.values()), batch_size)
    elapsed = time.perf_counter() - start
    audio_s = sum(len(e.source_audio) for e in examples.values()) / model.sampling_rate
    speed = speed.add(audio_s, elapsed, compiled=Compilations.count > compiled)
    responses = scorer.add(
        first.set_name, list(examples.values()), result, has_references=first.has_reference
    )
    rtf = elapsed / audio_s
    return {i: (r, rtf) for i, r in zip(examples, responses, strict=True)}, speed


def _batches(
    dialogues: Sequence[Dialogue],
    dataset: DuplexS2SDataset,
    size: int,
    done: Container[int],
) -> Iterator[_Batch]:
    """Yields batches of one set each, longest first, and reads the next one in the background.

    Conversations whose index is in `done` are skipped.
    """
    chunks = _chunks(dialogues, size, done)
    reading = read_ahead(
        itertools.chain.from_iterable(chunks),
        lambda index: dialogues[index].example(dataset),
        ahead=size + 1,  # the next batch, while this one's last conversation is taken
    )
    with contextlib.closing(reading):
        for chunk in chunks:
            examples: dict[int, DuplexExample] = {}
            failures: dict[int, AudioError] = {}
            for index, future in itertools.islice(reading, len(chunk)):
                try:
                    examples[index] = future.result()
                except AudioError as error:
                    failures[index] = error
            yield _Batch(examples=examples, failures=failures)


def _chunks(dialogues: Sequence[Dialogue], size: int, done: Container[int]) -> list[list[int]]:
    """Indices of the conversations of each batch, without those that are `done`."""
    sets: dict[str, list[int]] = {}
    for index, dialogue in enumerate(dialogues):
        if index not in done:
            sets.setdefault(dialogue.set_name, []).append(index)
    chunks: list[list[int]] = []
    for indices in sets.values():
        indices.sort(key=lambda i: -dialogues[i].duration_s)
        chunks += [indices[i : i + size] for i in range(0, len(indices), size)]
    return chunks


def _result(
    scorer: DuplexScorer,
    dialogue: Dialogue,
    response: DuplexResponse,
    file: Path | None,
    rtf: float,
    roles: tuple[str, ...],
) -> DialogueResult:
    model, example = scorer.model, response.example
    user, agent = scorer.turns_of(response)
    turns = _turns(model, response.tokens, FIRST_TOKEN_FRAME)
    return DialogueResult(
        id=dialogue.id,
        set_name=dialogue.set_name,
        duration_s=len(example.source_audio) / model.sampling_rate,
        user_text=example.source_text if dialogue.has_reference else None,
        text=example.target_text if dialogue.has_reference else None,
        pred_text=response.text,
        asr_text=response.asr_text,
        audio=None if file is None else str(file),
        user_turns=_turns(model, example.source_tokens),
        reference_turns=_turns(model, example.target_tokens),
        agent_turns=turns,
        marks=tuple(turn_marks(user, agent)),
        counts=response.counts,
        events=events_of(scorer, dialogue, response, turns, roles),
        rtf=rtf,
    )


def _turns(
    model: DuplexS2SModel, tokens: Int[np.ndarray, " T"], first_frame: int = 0
) -> tuple[TranscribedTurn, ...]:
    ids = model.turn_ids
    return tuple(
        text_turns(
            tokens,
            model.tokenizer.ids_to_text,
            bos_id=ids.bos,
            eos_id=ids.eos,
            pad_id=ids.pad,
            frame_s=model.token_equivalent_duration,
            first_frame=first_frame,
        )
    )


def _failure(dialogue: Dialogue, error: AudioError) -> DialogueResult:
    return DialogueResult(
        id=dialogue.id,
        set_name=dialogue.set_name,
        duration_s=dialogue.duration_s,
        user_text=None,
        text=None,
        pred_text="",
        error=str(error),
        cause=error.cause,
    )
