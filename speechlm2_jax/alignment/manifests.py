"""Adds words with times to each row of a manifest of JSON lines; a stopped run resumes."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError, read_audio
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.timestamps.word_times import AlignedText, word_times
from speechlm2_jax.settings import SettingsError

ROWS_AT_ONCE = 64
"""Rows that are read, aligned and written together."""
READERS = 2
WORDS, SCORE, PROBLEM = "words", "alignment_score", "alignment_problem"
"""Keys that are added to a row."""
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
    """Rows of earlier runs."""
    audio_s: float = 0.0
    """Seconds of audio that this run aligned."""
    problems: tuple[tuple[str, str], ...] = ()
    """(recording, reason) of rows that could not be aligned, of earlier runs too."""


def align_manifest(
    manifest: str | Path,
    aligner: Aligner,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    report: Report = lambda done, total: None,
) -> AlignmentTotals:
    """Writes the rows of a manifest with the times of their words. Rows and their order stay.

    A row needs `audio_filepath` (relative to the manifest, as in NeMo) and `text`; `offset` and
    `duration` choose a stretch of the recording. It gets `words`, a list of `word`, `start` and
    `end` in seconds from the start of its stretch, `confidence` from a CTC head, and
    `is_estimated` for words without frames; and `alignment_score`. A row that cannot be aligned
    gets `alignment_problem` instead.

    `output` is by default NAME_words.jsonl beside the manifest. If it has rows already, the run
    resumes after them. `report` is called after every few rows. Raises SettingsError for a manifest
    that cannot be read, and for an output with other rows (`overwrite` replaces it).
    """
    path = Path(manifest)
    target = path.with_name(f"{path.stem}_words.jsonl") if output is None else Path(output)
    rows = _read_rows(path)
    if target.resolve() == path.resolve():
        raise SettingsError(f"--output: {target} is the manifest itself; name another file")
    if overwrite:
        target.unlink(missing_ok=True)
    written = _written(target, rows)
    problems = [
        (str(row["audio_filepath"]), str(row[PROBLEM])) for row in written if PROBLEM in row
    ]
    totals = AlignmentTotals(
        target, rows=len(written), resumed=len(written), problems=tuple(problems)
    )
    report(len(written), len(rows))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file, ThreadPoolExecutor(READERS) as pool:
        for start in range(len(written), len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            done, audio_s = _align_rows(some, path.parent, aligner, pool)
            moved = [_from(row, path.parent, target.parent) for row in done]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in moved))
            file.flush()
            found = [(str(r["audio_filepath"]), str(r[PROBLEM])) for r in done if PROBLEM in r]
            totals = replace(
                totals,
                rows=totals.rows + len(done),
                audio_s=totals.audio_s + audio_s,
                problems=(*totals.problems, *found),
            )
            report(totals.rows, len(rows))
    return totals


def _read_rows(path: Path) -> list[Row]:
    """The rows of a manifest. Raises SettingsError for one that cannot be aligned as it stands."""
    if not path.is_file():
        raise SettingsError(f"{path}: no such file")
    rows = [_checked(row, where) for where, row in json_lines(path)]
    if not rows:
        raise SettingsError(f"{path}: has no rows")
    return rows


def _checked(row: Row, place: str) -> Row:
    for key in ("audio_filepath", "text"):
        if not isinstance(row.get(key), str):
            raise SettingsError(f'{place}: expected a JSON object with a text in "{key}"')
    for key in ("offset", "duration"):
        if not isinstance(row.get(key, 0), int | float | None):
            raise SettingsError(f'{place}: "{key}" must be a number of seconds, got {row[key]!r}')
    return row


def _written(target: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows that an earlier run wrote. A last line that it did not finish is cut off.

    Raises SettingsError if they are not the first rows of the manifest.
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
    same = len(found) <= len(rows) and all(
        isinstance(own, dict)
        and own.get("text") == row["text"]
        and Path(str(own.get("audio_filepath"))).name == Path(row["audio_filepath"]).name
        for own, row in zip(found, rows, strict=False)
    )
    if not same:
        raise SettingsError(
            f"{target}: has rows of another manifest; name another --output, or --overwrite"
        )
    if len(whole) < len(content):
        os.truncate(target, len(whole))
    return found


def _align_rows(
    rows: Sequence[Row], folder: Path, aligner: Aligner, pool: ThreadPoolExecutor
) -> tuple[list[Row], float]:
    """Rows with their words, and the seconds of audio of those that could be read."""

    def read(row: Row) -> np.ndarray | AudioError:
        try:
            return read_audio(
                folder / row["audio_filepath"],
                sample_rate_hz=aligner.sampling_rate,
                offset_s=row.get("offset") or 0.0,
                duration_s=row.get("duration"),
            )
        except AudioError as error:
            return error

    waves = list(pool.map(read, rows))
    is_read = [n for n, wave in enumerate(waves) if isinstance(wave, np.ndarray)]
    chosen = [np.asarray(waves[n]) for n in is_read]
    aligned = word_times(chosen, [rows[n]["text"] for n in is_read], aligner)
    done = [{**row, PROBLEM: str(wave)} for row, wave in zip(rows, waves, strict=True)]
    for n, own in zip(is_read, aligned, strict=True):
        done[n] = {**_without_words(rows[n]), **_keys(own)}
    return done, sum(map(len, chosen)) / aligner.sampling_rate


def _without_words(row: Row) -> Row:
    """A row without the keys of an earlier alignment."""
    return {key: value for key, value in row.items() if key not in (WORDS, SCORE, PROBLEM)}


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


def _from(row: Row, folder: Path, target: Path) -> Row:
    """A row whose path is as seen from the folder of the output."""
    if target.resolve() == folder.resolve():
        return row
    audio = (folder / row["audio_filepath"]).resolve()
    return {**row, "audio_filepath": str(audio)}


def sample_problems(totals: AlignmentTotals, most: int = 5) -> Iterator[str]:
    """One line for each of the first rows that could not be aligned."""
    for name, reason in totals.problems[:most]:
        yield f"{name}: {reason}"
    if len(totals.problems) > most:
        yield f"... and {len(totals.problems) - most} more; their rows have {PROBLEM}"
