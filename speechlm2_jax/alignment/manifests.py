"""Adds words with times to each row of a manifest of JSON lines; a stopped run resumes."""

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError, read_audio
from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_values import located, seconds
from speechlm2_jax.data.output_folders import check_writable, lock_file
from speechlm2_jax.data.readers import beside
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.timestamps.word_times import AlignedText, word_times
from speechlm2_jax.settings import SettingsError

ROWS_AT_ONCE = 64
"""Rows that are read, aligned and written together."""
READERS = 2
WORDS, SCORE, PROBLEM = "words", "alignment_score", "alignment_problem"
MODEL = "alignment_model"
"""Keys that are added to a row."""
UNREADABLE = "cannot be read: "
"""How the problem of a row begins whose recording could not be read: it is tried again."""
Row = dict[str, Any]
Report = Callable[[int, int], None]
"""(rows that are written, rows of the manifest)."""


@dataclass(frozen=True)
class AlignmentTotals:
    """What a run did."""

    output: Path
    rows: int = 0
    """Rows that are written now, those of earlier runs included."""
    resumed: int = 0
    """Rows of earlier runs; of these, recordings that could not be read are tried again."""
    audio_s: float = 0.0
    """Seconds of audio that this run aligned."""
    problems: tuple[tuple[str, str], ...] = ()
    """(recording, reason) of rows that could not be aligned, of earlier runs too."""


@dataclass(frozen=True)
class _Task:
    """The rows of a manifest, and how they are aligned and written."""

    rows: Sequence[Row]
    places: Sequence[AudioLocation]
    """The recording of each row."""
    outputs: Sequence[Row]
    """The rows with their paths as seen from the folder of the output."""
    model: str | None
    """The name of the aligner, if it is to be written."""


def align_manifest(
    manifest: str | Path,
    aligner: Aligner | Callable[[], Aligner],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    model: str | None = None,
    report: Report = lambda done, total: None,
) -> AlignmentTotals:
    """Writes the rows of a manifest with the times of their words. Rows and their order stay.

    A row needs `audio_filepath` (as in NeMo: beside the manifest, in the working folder, absolute,
    or an address) and `text`; `offset` and `duration` choose a stretch of the recording. It gets
    `words`, a list of `word`, `start` and `end` in seconds from the start of its stretch,
    `confidence` from a CTC head, and `is_estimated` for words without frames; `alignment_score`;
    and `model`, the aligner's name, as `alignment_model`. A row that cannot be aligned gets
    `alignment_problem` instead.

    `aligner` may be a function that opens it, which is called once the manifest is read. `output`
    is by default NAME_words.jsonl beside the manifest. If it has rows already, the run resumes
    after them, and tries recordings again that could not be read. `report` is called after every
    few rows. Raises SettingsError for a manifest that cannot be read, and for an output with other
    rows or of another `model` (`overwrite` replaces it), or that another run is writing.
    """
    path = Path(manifest)
    target = path.with_name(f"{path.stem}_words.jsonl") if output is None else Path(output)
    task = _read_task(path, target, model)
    if target.resolve() == path.resolve():
        raise SettingsError(f"--output: {target} is the manifest itself; name another file")
    if target.is_dir():
        raise SettingsError(f"--output: {target} is a folder; name a file")
    check_writable(target.parent, "--output")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        written = [] if overwrite else _written(target, task)
        opened = aligner if isinstance(aligner, Aligner) else aligner()
        if overwrite:
            target.unlink(missing_ok=True)
        return _run(task, target, written, opened, report)


@contextmanager
def _alone(target: Path) -> Generator[None]:
    """Keeps every other run from writing `target`, by a lock that ends with the process.

    The lock is of a file beside it, which is removed: the output itself may be replaced. Raises
    SettingsError if another run has it.
    """
    path = target.with_name(f".{target.name}.lock")
    with path.open("wb") as file:
        is_own = lock_file(file) and path.exists()
        if not is_own or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise SettingsError(
                f"--output: another run is writing {target}; wait until it ends, or name another"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _run(
    task: _Task, target: Path, written: list[Row], aligner: Aligner, report: Report
) -> AlignmentTotals:
    """Aligns what is not `written` yet, after the rows of it that could not be read."""
    totals = AlignmentTotals(target, rows=len(written), resumed=len(written))
    report(len(written), len(task.rows))
    with ThreadPoolExecutor(READERS) as pool:

        def align(numbers: Sequence[int]) -> list[Row]:
            nonlocal totals
            done, audio_s = _align_rows(numbers, task, aligner, pool)
            totals = replace(totals, audio_s=totals.audio_s + audio_s)
            return done

        unreadable = [n for n, row in enumerate(written) if _is_unreadable(row)]
        for some in _batches(unreadable):
            for n, row in zip(some, align(some), strict=True):
                written[n] = row
        if unreadable:
            _replace(target, written)
        totals = replace(totals, problems=_problems(written))
        with target.open("a", encoding="utf-8") as file:
            for some in _batches(range(len(written), len(task.rows))):
                done = align(some)
                file.write(_lines(done))
                file.flush()
                problems = (*totals.problems, *_problems(done))
                totals = replace(totals, rows=totals.rows + len(done), problems=problems)
                report(totals.rows, len(task.rows))
    return totals


def _batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        yield numbers[start : start + ROWS_AT_ONCE]


def _problems(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    return tuple((str(row["audio_filepath"]), str(row[PROBLEM])) for row in rows if PROBLEM in row)


def _is_unreadable(row: Row) -> bool:
    return str(row.get(PROBLEM, "")).startswith(UNREADABLE)


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _replace(target: Path, rows: Sequence[Row]) -> None:
    """Writes rows in the place of those that are there; a stop leaves the one or the other."""
    draft = target.with_name(f".{target.name}.draft")
    try:
        draft.write_text(_lines(rows), encoding="utf-8")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _read_task(path: Path, target: Path, model: str | None) -> _Task:
    """What a manifest asks for. Raises SettingsError for one that cannot be read."""
    if not path.is_file():
        raise SettingsError(f"{path}: no such file")
    find = beside(path)
    is_same_folder = target.parent.resolve() == path.parent.resolve()
    rows, places, outputs = list[Row](), list[AudioLocation](), list[Row]()
    for where, row in json_lines(path):
        _check(row, where)
        with located(where):
            place = find(row["audio_filepath"])
        own = place.path if is_remote(place.path) else os.path.abspath(place.path)
        rows.append(row)
        places.append(place)
        outputs.append(_without_words(row if is_same_folder else row | {"audio_filepath": own}))
    if not rows:
        raise SettingsError(f"{path}: has no rows")
    return _Task(rows, places, outputs, model)


def _check(row: Row, place: str) -> None:
    """Raises SettingsError for a row that cannot be aligned as it stands."""
    for key in ("audio_filepath", "text"):
        if not isinstance(row.get(key), str):
            raise SettingsError(f'{place}: expected a JSON object with a text in "{key}"')
    with located(place):
        for key in ("offset", "duration"):
            if row.get(key) is not None:
                seconds(row[key], key)


def _written(target: Path, task: _Task) -> list[Row]:
    """The rows that an earlier run wrote. A last line that it did not finish is cut off.

    Raises SettingsError if they are not the first rows of the manifest, or of another aligner.
    """
    if not target.exists():
        return []
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        found = [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError as error:
        raise SettingsError(
            f"{target}: not a file of JSON lines; --overwrite replaces it"
        ) from error
    same = len(found) <= len(task.rows) and all(
        isinstance(own, dict) and _asked(own) == _asked(row)
        for own, row in zip(found, task.outputs, strict=False)
    )
    if not same:
        raise SettingsError(
            f"{target}: has rows of another manifest; name another --output, or --overwrite"
        )
    if others := {str(own.get(MODEL)) for own in found if own.get(MODEL) != task.model}:
        raise SettingsError(
            f"{target}: has rows that {', '.join(sorted(others))} aligned; name another --output, "
            "or --overwrite"
        )
    if len(whole) < len(content):
        os.truncate(target, len(whole))
    return found


def _asked(row: Row) -> tuple[object, ...]:
    """What is aligned: the recording, its stretch and the text."""
    offset_s = row.get("offset") or 0.0
    return row.get("audio_filepath"), offset_s, row.get("duration"), row.get("text")


def _align_rows(
    numbers: Sequence[int], task: _Task, aligner: Aligner, pool: ThreadPoolExecutor
) -> tuple[list[Row], float]:
    """Rows as they are written, and the seconds of audio of those that could be read."""

    def read(n: int) -> np.ndarray | AudioError:
        row = task.rows[n]
        try:
            return read_audio(
                task.places[n].source(row["audio_filepath"]),
                sample_rate_hz=aligner.sampling_rate,
                offset_s=row.get("offset") or 0.0,
                duration_s=row.get("duration"),
            )
        except AudioError as error:
            return error

    waves = dict(zip(numbers, pool.map(read, numbers), strict=True))
    chosen = {n: wave for n, wave in waves.items() if isinstance(wave, np.ndarray)}
    texts = [task.rows[n]["text"] for n in chosen]
    aligned = dict(zip(chosen, word_times(list(chosen.values()), texts, aligner), strict=True))
    model = {} if task.model is None else {MODEL: task.model}
    found = {n: _keys(own) for n, own in aligned.items()}
    failed = {n: {PROBLEM: f"{UNREADABLE}{waves[n]}"} for n in numbers if n not in found}
    done = [{**task.outputs[n], **(found | failed)[n], **model} for n in numbers]
    return done, sum(map(len, chosen.values())) / aligner.sampling_rate


def _without_words(row: Row) -> Row:
    """A row without the keys of an earlier alignment."""
    added = (WORDS, SCORE, PROBLEM, MODEL)
    return {key: value for key, value in row.items() if key not in added}


def _keys(aligned: AlignedText) -> Mapping[str, object]:
    """What a row gets."""
    if aligned.problem is not None:
        return {PROBLEM: aligned.problem}
    words = [
        {"word": word.text, "start": word.start, "end": word.end}
        | ({} if word.confidence is None else {"confidence": round(word.confidence, 4)})
        | ({"is_estimated": True} if word.is_estimated else {})
        for word in aligned.words
    ]
    score = {} if aligned.score is None else {SCORE: round(aligned.score, 4)}
    return {WORDS: words, **score}


def sample_problems(totals: AlignmentTotals, most: int = 5) -> Iterator[str]:
    """One line for each of the first rows that could not be aligned."""
    for name, reason in totals.problems[:most]:
        yield f"{name}: {reason}"
    if len(totals.problems) > most:
        yield f"... and {len(totals.problems) - most} more; their rows have {PROBLEM}"
