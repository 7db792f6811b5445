"""A duplex model takes part in every conversation, in batches of a fixed size, and is scored."""

import contextlib
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speechlm2_jax.batches import DuplexExample
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.evaluation.compilations import Compilations
from speechlm2_jax.evaluation.duplex import scoring
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.results import DialogueAnswer, DuplexEvaluation
from speechlm2_jax.evaluation.duplex.scoring import (
    FIRST_SAID_FRAME,
    DuplexResponse,
    DuplexScorer,
    EarlierAnswer,
)
from speechlm2_jax.evaluation.duplex.turns import SaidTurn, said_turns
from speechlm2_jax.evaluation.journal import Journal, row_keys
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, turn_marks
from speechlm2_jax.evaluation.progress import ProgressDisplay
from speechlm2_jax.evaluation.results import Speed
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.settings import build, to_plain

READERS = 4
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Conversations of one set by their places among the inputs: read, and not readable."""

    examples: Mapping[int, DuplexExample]
    failures: Mapping[int, AudioError]


def open_scorer(
    model: DuplexS2SModel, config: DuplexEvalConfig, *, keeps_audio: bool
) -> DuplexScorer:
    """Loads the scoring ASR, if there is to be one.

    Raises SettingsError or ConversionError for one that cannot be used.
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
) -> DuplexEvaluation:
    """Answers the conversations, set by set, longest first; the answers come in input order.

    The agent's speech is written to files below `audio_folder`, if that is given. A conversation
    whose audio cannot be read becomes an answer with its error. With a `journal` each answer is
    written as it ends, and what that has already is not answered again. The scorer's ASR is let go
    of.
    """
    Compilations.listen()
    files = _files(dialogues, audio_folder)
    answers, speed = _resumed(journal, scorer, files)
    with (
        contextlib.closing(scorer),
        ProgressDisplay(len(dialogues), len(answers)) as progress,
    ):
        for batch in _batches(dialogues, dataset, config.batch_size, frozenset(answers)):
            rows: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
            for index, error in batch.failures.items():
                answers[index] = _failure(dialogues[index], error)
                rows[index] = (answers[index].row(config.use_normalizer), {})
                log(f"skipped {dialogues[index].id}: {error}")
            if batch.examples:
                filled = config.batch_size if speed.generate_s else 0  # no new shape is compiled
                said, speed = _said(scorer, dialogues, batch.examples, filled, speed)
                for index, (answer, rtf) in said.items():
                    _write(files.get(index), answer.audio, scorer.model.target_sampling_rate)
                    answers[index] = _answer(
                        scorer, dialogues[index], answer, files.get(index), rtf
                    )
                    rows[index] = (
                        answers[index].row(config.use_normalizer),
                        _progress(scorer, answers[index], answer, speed),
                    )
                    if config.verbose or not dialogues[index].has_reference:
                        log(answers[index].summary())
            if journal is not None:
                journal.append(rows)
            progress.update(len(rows))
        scores = scorer.compute()
    return DuplexEvaluation(
        answers=tuple(answers[i] for i in range(len(dialogues))), scores=scores, speed=speed
    )


def input_keys(dialogues: Sequence[Dialogue]) -> list[str]:
    """What tells the conversations of a journal apart."""
    return row_keys([(d.set_name, d.id, d.duration_s, d.has_reference) for d in dialogues])


def _progress(
    scorer: DuplexScorer, whole: DialogueAnswer, answer: DuplexResponse, speed: Speed
) -> dict[str, Any]:
    """What a row of the output manifest does not say of an answer."""
    user, agent = scorer.turns_of(answer)
    return {
        "answer": to_plain(whole),
        "user": user.segments(),
        "agent": agent.segments(),
        "speed": to_plain(speed),
    }


def _resumed(
    journal: Journal | None, scorer: DuplexScorer, files: Mapping[int, Path]
) -> tuple[dict[int, DialogueAnswer], Speed]:
    """The answers that a journal has, added to the scorer.

    What could not be read before, and what is without its file of speech, is answered again.
    """
    answers: dict[int, DialogueAnswer] = {}
    speed = Speed()
    if journal is None:
        return answers, speed
    journal.forget(
        [
            index
            for index, kept in journal.kept.items()
            if "error" in kept.row or (index in files and not files[index].is_file())
        ]
    )
    for index, kept in journal.kept.items():
        answer = build(DialogueAnswer, kept.progress["answer"])
        speed = max(speed, build(Speed, kept.progress["speed"]), key=lambda s: s.generate_s)
        answers[index] = answer
        scorer.add_earlier(
            answer.set_name,
            EarlierAnswer(
                reference=answer.text,
                text=answer.pred_text,
                heard=answer.heard,
                user=Turns.from_segments(map(tuple, kept.progress["user"])),
                agent=Turns.from_segments(map(tuple, kept.progress["agent"])),
                counts=answer.counts,
            ),
        )
    return answers, speed


def _said(
    scorer: DuplexScorer,
    dialogues: Sequence[Dialogue],
    examples: Mapping[int, DuplexExample],
    rows: int,
    speed: Speed,
) -> tuple[dict[int, tuple[DuplexResponse, float]], Speed]:
    """What is said in each conversation and how many seconds of work one of audio took."""
    first, model = dialogues[next(iter(examples))], scorer.model
    compiled, start = Compilations.count, time.perf_counter()
    result = scorer.speak(list(examples.values()), rows)
    elapsed = time.perf_counter() - start
    audio_s = sum(len(e.source_audio) for e in examples.values()) / model.sampling_rate
    speed = speed.add(audio_s, elapsed, compiled=Compilations.count > compiled)
    said = scorer.add(
        first.set_name, list(examples.values()), result, has_references=first.has_reference
    )
    rtf = elapsed / audio_s
    return {i: (answer, rtf) for i, answer in zip(examples, said, strict=True)}, speed


def _batches(
    dialogues: Sequence[Dialogue],
    dataset: DuplexS2SDataset,
    size: int,
    answered: Container[int],
) -> Iterator[_Batch]:
    """Batches of one set each, longest first, the next one read while this one is answered.

    Those of `answered` are left out.
    """
    sets: dict[str, list[int]] = {}
    for index, dialogue in enumerate(dialogues):
        if index in answered:
            continue
        sets.setdefault(dialogue.set_name, []).append(index)
    chunks: list[list[int]] = []
    for places in sets.values():
        places.sort(key=lambda i: -dialogues[i].duration_s)
        chunks += [places[i : i + size] for i in range(0, len(places), size)]
    with ThreadPoolExecutor(READERS) as pool:

        def submit(number: int) -> dict[int, Future[DuplexExample]]:
            chosen = chunks[number] if number < len(chunks) else []
            return {i: pool.submit(dialogues[i].example, dataset) for i in chosen}

        ahead = submit(0)
        for number in range(len(chunks)):
            futures, ahead = ahead, submit(number + 1)
            examples: dict[int, DuplexExample] = {}
            failures: dict[int, AudioError] = {}
            for index, future in futures.items():
                try:
                    examples[index] = future.result()
                except AudioError as error:
                    failures[index] = error
            yield _Batch(examples=examples, failures=failures)


def _answer(
    scorer: DuplexScorer, dialogue: Dialogue, answer: DuplexResponse, file: Path | None, rtf: float
) -> DialogueAnswer:
    model, example = scorer.model, answer.example
    user, agent = scorer.turns_of(answer)
    return DialogueAnswer(
        id=dialogue.id,
        set_name=dialogue.set_name,
        duration_s=len(example.source_audio) / model.sampling_rate,
        user_text=example.source_text if dialogue.has_reference else None,
        text=example.target_text if dialogue.has_reference else None,
        pred_text=answer.text,
        heard=answer.heard,
        audio=None if file is None else str(file),
        user_turns=_turns(model, example.source_tokens),
        reference_turns=_turns(model, example.target_tokens),
        agent_turns=_turns(model, answer.tokens, FIRST_SAID_FRAME),
        marks=tuple(turn_marks(user, agent)),
        counts=answer.counts,
        rtf=rtf,
    )


def _turns(model: DuplexS2SModel, tokens: np.ndarray, first_frame: int = 0) -> tuple[SaidTurn, ...]:
    ids = model.turn_ids
    return tuple(
        said_turns(
            tokens,
            model.tokenizer.ids_to_text,
            bos_id=ids.bos,
            eos_id=ids.eos,
            pad_id=ids.pad,
            frame_s=model.token_equivalent_duration,
            first_frame=first_frame,
        )
    )


def _failure(dialogue: Dialogue, error: AudioError) -> DialogueAnswer:
    return DialogueAnswer(
        id=dialogue.id,
        set_name=dialogue.set_name,
        duration_s=dialogue.duration_s,
        user_text=None,
        text=None,
        pred_text="",
        error=str(error),
        cause=error.cause,
    )


def _files(dialogues: Sequence[Dialogue], folder: Path | None) -> dict[int, Path]:
    """A file for each conversation, in a folder for each set; ids may hold anything."""
    files: dict[int, Path] = {}
    taken: set[Path] = set()
    for index, dialogue in enumerate(dialogues if folder is not None else ()):
        assert folder is not None
        path = folder / _name(dialogue.set_name) / f"{_name(dialogue.id)}.wav"
        files[index] = path.with_stem(f"{path.stem}_{index}") if path in taken else path
        taken.add(files[index])
    return files


def _name(text: str) -> str:
    """A name that any file system takes."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    return kept[:120] or "_"


def _write(file: Path | None, audio: np.ndarray, rate_hz: int) -> None:
    """Writes [A] samples as 16-bit WAV, if there is a file to write."""
    import soundfile

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(str(file), np.clip(audio, -1, 1), rate_hz, subtype="PCM_16")
