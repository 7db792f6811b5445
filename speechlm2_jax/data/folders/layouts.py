"""Finds the recordings of a folder and their texts, in the layouts that people have.

Each layout is a function from the folder to its recordings, or to nothing if the folder is not of
that layout. They are asked in the order of LAYOUTS.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechlm2_jax.bundled import page
from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.data.folders.files import FolderFiles
from speechlm2_jax.data.folders.naming import set_named, set_of, speakers_of
from speechlm2_jax.data.folders.tables import (
    STRETCH_COLUMNS,
    columns,
    first_of,
    records,
    text_of,
    value_of,
)
from speechlm2_jax.data.json_lines import text_lines
from speechlm2_jax.settings import SettingsError

AUDIO_COLUMNS = (
    *("audio_filepath", "file_name", "filename", "audio_path", "path", "audio", "wav", "file"),
    *("wav_filename", "wav_path", "audio_file", "clip", "recording"),
)
TEXT_COLUMNS = (
    *("text", "transcription", "transcript", "sentence", "normalized_text", "normalised_text"),
    *("label", "words", "raw_text"),
)
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id", "voice", "spk", "spk_id", "user_id")
SET_COLUMNS = ("split", "subset", "partition")
TABLES = (".csv", ".tsv")
COMMON_VOICE_SETS = ("train.tsv", "dev.tsv", "test.tsv")
"""Lists of Mozilla Common Voice; no speaker is in two of them."""
COMMON_VOICE_ALL, COMMON_VOICE_REST = "validated.tsv", "other.tsv"
"""Its lists of what is in those and more, and of what is in none."""
HUGGING_FACE = ("metadata.csv", "metadata.jsonl")
LIBRISPEECH = "*.trans.txt"
_LJSPEECH_ROW = re.compile(r"[^|]+\|[^|]*(\|[^|]*)?")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recording and what the folder has about it."""

    audio: Path
    text: str | None
    """None where a recording has no text beside it."""
    speaker: str | None = None
    where: str
    """The line or file that holds the text, for messages."""
    set: str | None = None
    """The set that its list, its folder or a column of its list names: train, validation, ..."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a folder holds."""

    layout: str
    """Its layout in words."""
    recordings: tuple[Found, ...]
    """In the order of their lists, or of their paths."""
    unlisted: tuple[Path, ...] = ()
    """Recordings that no list names."""


def read_folder(root: Path) -> Folder:
    """The recordings of a folder.

    Raises SettingsError for a folder that is not there, that holds no recording, or whose list
    cannot be read.
    """
    if not root.is_dir():
        raise SettingsError(f"{root}: no such folder")
    files = FolderFiles.below(root)
    for name, read in LAYOUTS.items():
        found = read(files)
        if found is not None:
            named = {one.audio.resolve() for one in found}
            unlisted = tuple(path for path in files.audio if path.resolve() not in named)
            return Folder(layout=name, recordings=_once_in_sets(found), unlisted=unlisted)
    for table in _tables(root):
        raise _unnamed(table, "recordings", AUDIO_COLUMNS)
    if not files.audio:
        raise SettingsError(f"{root}: no recording in it ({' '.join(AUDIO_SUFFIXES[:9])} ...)")
    return Folder(layout="recordings without texts", recordings=tuple(_bare(files.audio)))


def _once_in_sets(found: Sequence[Found]) -> tuple[Found, ...]:
    """Without the rows of lists of no set whose recordings a list of a set names too."""
    in_sets = {one.audio for one in found if one.set is not None}
    return tuple(one for one in found if one.set is not None or one.audio not in in_sets)


def _bare(audio: Iterable[Path]) -> Iterator[Found]:
    for path in audio:
        yield Found(audio=path, text=None, where=str(path))


def _common_voice(files: FolderFiles) -> list[Found] | None:
    """Common Voice: the rows of its lists of sets if two have any, else of its widest list.

    Beside lists of sets, what validated.tsv has alone is of no set.
    """
    clips = files.root / "clips"
    names = (COMMON_VOICE_ALL, *COMMON_VOICE_SETS, COMMON_VOICE_REST)
    if not clips.is_dir() or not any((files.root / name).is_file() for name in names):
        return None

    def rows(name: str) -> list[Found]:
        path = files.root / name
        return list(_rows(path, files, (clips, files.root))) if path.is_file() else []

    of_sets = [own for name in COMMON_VOICE_SETS if (own := rows(name))]
    if len(of_sets) < 2:
        found = rows(COMMON_VOICE_ALL) or sum(of_sets, []) or rows(COMMON_VOICE_REST)
        return [replace(one, set=None) for one in found]
    return sum(of_sets, []) + rows(COMMON_VOICE_ALL)


def _librispeech(files: FolderFiles) -> list[Found] | None:
    lists = files.named(LIBRISPEECH)
    return [one for path in lists for one in _transcripts(path, files)] if lists else None


def _transcripts(path: Path, files: FolderFiles) -> Iterator[Found]:
    """LibriSpeech's lines `SPEAKER-CHAPTER-NUMBER TEXT`; the recordings lie beside the list."""
    for where, line in text_lines(path):
        name, _, text = line.strip().partition(" ")
        if name:
            audio = files.placed(name, (path.parent,))
            speaker = name.split("-")[0]
            own_set = set_of(files.root, audio)
            yield Found(audio=audio, text=text, speaker=speaker, where=where, set=own_set)


def _audiofolder(files: FolderFiles) -> list[Found] | None:
    """Hugging Face's audiofolder: a list with the column `file_name` in the folder or below it."""
    lists = sorted(path for name in HUGGING_FACE for path in files.named(name))
    lists = [path for path in lists if "file_name" in columns(path)]
    return [one for path in lists for one in _rows(path, files, (path.parent,))] or None


def _ljspeech(files: FolderFiles) -> list[Found] | None:
    """LJSpeech's metadata.csv: `NAME|text|normalised text` without a head; audio in wavs/."""
    table, wavs = files.root / "metadata.csv", files.root / "wavs"
    if not table.is_file() or not wavs.is_dir():
        return None
    lines = [(where, line) for where, line in text_lines(table) if line.strip()]
    if not all(_LJSPEECH_ROW.fullmatch(line) for _, line in lines):
        return None
    found = []
    for where, line in lines:
        name, raw, *normalised = line.split("|")
        text = next((text for text in (*normalised, raw) if text.strip()), "")
        found.append(Found(audio=files.placed(name, (wavs,)), text=text, where=where))
    return found


def _table(files: FolderFiles) -> list[Found] | None:
    """CSV and TSV files with a column of audio files and one of texts, in the folder itself."""
    root = files.root
    fitting = [p for p in _tables(root) if first_of(columns(p), AUDIO_COLUMNS) is not None]
    folders = (root, root / "audio", root / "wav", root / "wavs", root / "clips")
    return [one for path in fitting for one in _rows(path, files, folders)] or None


def _tables(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.suffix.lower() in TABLES and p.is_file())


def _sidecars(files: FolderFiles) -> list[Found] | None:
    """`a.wav` with `a.txt` or `a.json` beside it; a folder below `root` may name the speaker."""
    speakers = speakers_of(files.root, files.audio)
    pairs = zip(files.audio, speakers, strict=True)
    found = [_with_sidecar(path, speaker, files) for path, speaker in pairs]
    return found if any(one.text is not None for one in found) else None


def _with_sidecar(audio: Path, speaker: str | None, files: FolderFiles) -> Found:
    bare = Found(
        audio=audio, text=None, speaker=speaker, where=str(audio), set=set_of(files.root, audio)
    )
    if (text_file := files.find(audio.with_suffix(".txt"))) is not None:
        words = " ".join(line.strip() for _, line in text_lines(text_file)).strip()
        return replace(bare, text=words, where=str(text_file))
    if (json_file := files.find(audio.with_suffix(".json"))) is not None:
        row = _json(json_file)
        where = str(json_file)
        text = value_of(where, row, TEXT_COLUMNS)
        own = value_of(where, row, SPEAKER_COLUMNS) or speaker
        return replace(bare, text=text, speaker=own, where=where)
    return bare


LAYOUTS: Mapping[str, Callable[[FolderFiles], list[Found] | None]] = {
    "Mozilla Common Voice": _common_voice,
    "LibriSpeech": _librispeech,
    "Hugging Face audiofolder": _audiofolder,
    "LJSpeech": _ljspeech,
    "a table": _table,
    "a text file or JSON beside each recording": _sidecars,
}


def _rows(table: Path, files: FolderFiles, folders: Sequence[Path]) -> Iterator[Found]:
    """The rows of a table. Raises SettingsError for one without a column of texts."""
    names = columns(table)
    audio, text = first_of(names, AUDIO_COLUMNS), first_of(names, TEXT_COLUMNS)
    if audio is None or text is None:
        missing = ("recordings", AUDIO_COLUMNS) if audio is None else ("texts", TEXT_COLUMNS)
        raise _unnamed(table, *missing)
    if stretch := first_of(names, STRETCH_COLUMNS):
        raise SettingsError(
            f"{table}: column {stretch!r}: its rows are stretches of recordings, and this command "
            "reads whole ones; cut them, or write a manifest with `offset` and `duration` "
            f"({page('data.md')})"
        )
    for where, row in records(table):
        name = row.get(audio)
        if not name:
            raise SettingsError(f"{where}: column {audio!r} is empty; it names the recording")
        place = files.placed(str(name), folders)
        own_set = set_named(value_of(where, row, SET_COLUMNS) or "")
        yield Found(
            audio=place,
            text=text_of(where, text, row.get(text)),
            speaker=value_of(where, row, SPEAKER_COLUMNS) or None,
            where=where,
            set=own_set or set_of(files.root, table, place),
        )


def _unnamed(table: Path, what: str, fitting: Sequence[str]) -> SettingsError:
    return SettingsError(
        f"{table}: no column of {what} among {', '.join(columns(table))}; "
        f"name it one of: {', '.join(fitting)}"
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise SettingsError(f"{path}: cannot be read as JSON ({error})") from error
    return row if isinstance(row, dict) else {}
