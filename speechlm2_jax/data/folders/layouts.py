"""Finds the recordings of a folder and their texts, in the layouts that people have.

Each layout is a function from the folder to its recordings, or to nothing if the folder is not of
that layout. They are asked in the order of LAYOUTS.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.data.folders.tables import (
    STRETCH_COLUMNS,
    columns,
    first_of,
    records,
    text_of,
    value_of,
)
from speechlm2_jax.data.json_lines import text_lines
from speechlm2_jax.data.paths import files_below
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
TABLES = (".csv", ".tsv")
COMMON_VOICE = ("validated.tsv", "train.tsv", "dev.tsv", "test.tsv", "other.tsv")
"""Lists of Mozilla Common Voice, the widest first: it is the one that is read."""
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
    audio = [path for path in files_below(root) if _is_audio(path)]
    for name, read in LAYOUTS.items():
        found = read(root, audio)
        if found is not None:
            named = {one.audio.resolve() for one in found}
            unlisted = tuple(path for path in audio if path.resolve() not in named)
            return Folder(layout=name, recordings=tuple(found), unlisted=unlisted)
    for table in _tables(root):
        raise _unnamed(table, "recordings", AUDIO_COLUMNS)
    if not audio:
        raise SettingsError(f"{root}: no recording in it ({' '.join(AUDIO_SUFFIXES[:9])} ...)")
    return Folder(layout="recordings without texts", recordings=tuple(_bare(audio)))


def _bare(audio: Iterable[Path]) -> Iterator[Found]:
    for path in audio:
        yield Found(audio=path, text=None, where=str(path))


def _is_audio(path: Path) -> bool:
    is_named_so = path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("._")
    return is_named_so and not path.is_dir()


def _common_voice(root: Path, _audio: Sequence[Path]) -> list[Found] | None:
    lists = [root / name for name in COMMON_VOICE if (root / name).is_file()]
    if not lists or not (root / "clips").is_dir():
        return None
    return list(_rows(lists[0], folders=(root / "clips", root)))


def _librispeech(root: Path, _audio: Sequence[Path]) -> list[Found] | None:
    lists = sorted(root.rglob(LIBRISPEECH))
    return [one for path in lists for one in _transcripts(path)] if lists else None


def _transcripts(path: Path) -> Iterator[Found]:
    """LibriSpeech's lines `SPEAKER-CHAPTER-NUMBER TEXT`; the recordings lie beside the list."""
    beside = {one.stem: one for one in path.parent.iterdir() if _is_audio(one)}
    for where, line in text_lines(path):
        name, _, text = line.strip().partition(" ")
        if name:
            audio = beside.get(name, path.parent / f"{name}.flac")
            yield Found(audio=audio, text=text, speaker=name.split("-")[0], where=where)


def _audiofolder(root: Path, _audio: Sequence[Path]) -> list[Found] | None:
    """Hugging Face's audiofolder: a list with the column `file_name` in the folder or below it."""
    lists = sorted(path for name in HUGGING_FACE for path in root.rglob(name))
    lists = [path for path in lists if "file_name" in columns(path)]
    return [one for path in lists for one in _rows(path, folders=(path.parent,))] or None


def _ljspeech(root: Path, _audio: Sequence[Path]) -> list[Found] | None:
    """LJSpeech's metadata.csv: `NAME|text|normalised text` without a head; audio in wavs/."""
    table = root / "metadata.csv"
    if not table.is_file() or not (root / "wavs").is_dir():
        return None
    lines = [(where, line) for where, line in text_lines(table) if line.strip()]
    if not all(_LJSPEECH_ROW.fullmatch(line) for _, line in lines):
        return None
    found = []
    for where, line in lines:
        name, raw, *normalised = line.split("|")
        text = next((text for text in (*normalised, raw) if text.strip()), "")
        found.append(Found(audio=_placed(name, (root / "wavs",)), text=text, where=where))
    return found


def _table(root: Path, _audio: Sequence[Path]) -> list[Found] | None:
    """CSV and TSV files with a column of audio files and one of texts, in the folder itself."""
    fitting = [p for p in _tables(root) if first_of(columns(p), AUDIO_COLUMNS) is not None]
    folders = (root, root / "audio", root / "wav", root / "wavs", root / "clips")
    return [one for path in fitting for one in _rows(path, folders=folders)] or None


def _tables(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.suffix.lower() in TABLES and p.is_file())


def _sidecars(root: Path, audio: Sequence[Path]) -> list[Found] | None:
    """`a.wav` with `a.txt` or `a.json` beside it; the folder below `root` may name the speaker."""
    found = [_with_sidecar(path, _speaker_of_folder(root, path)) for path in audio]
    return found if any(one.text is not None for one in found) else None


def _with_sidecar(audio: Path, speaker: str | None) -> Found:
    text_file, json_file = audio.with_suffix(".txt"), audio.with_suffix(".json")
    if text_file.is_file():
        words = " ".join(line.strip() for _, line in text_lines(text_file)).strip()
        return Found(audio=audio, text=words, speaker=speaker, where=str(text_file))
    if json_file.is_file():
        row = _json(json_file)
        where = str(json_file)
        text = value_of(where, row, TEXT_COLUMNS)
        own = value_of(where, row, SPEAKER_COLUMNS) or speaker
        return Found(audio=audio, text=text, speaker=own, where=where)
    return Found(audio=audio, text=None, speaker=speaker, where=str(audio))


def _speaker_of_folder(root: Path, audio: Path) -> str | None:
    """The folder of a recording, if there are folders: people keep a speaker in each."""
    parts = audio.relative_to(root).parts[:-1]
    return "/".join(parts) or None


LAYOUTS: Mapping[str, Callable[[Path, Sequence[Path]], list[Found] | None]] = {
    "Mozilla Common Voice": _common_voice,
    "LibriSpeech": _librispeech,
    "Hugging Face audiofolder": _audiofolder,
    "LJSpeech": _ljspeech,
    "a table": _table,
    "a text file or JSON beside each recording": _sidecars,
}


def _rows(table: Path, *, folders: Sequence[Path]) -> Iterator[Found]:
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
            "(docs/data.md)"
        )
    for where, row in records(table):
        name = row.get(audio)
        if not name:
            raise SettingsError(f"{where}: column {audio!r} is empty; it names the recording")
        yield Found(
            audio=_placed(str(name), folders),
            text=text_of(where, text, row.get(text)),
            speaker=value_of(where, row, SPEAKER_COLUMNS),
            where=where,
        )


def _unnamed(table: Path, what: str, fitting: Sequence[str]) -> SettingsError:
    return SettingsError(
        f"{table}: no column of {what} among {', '.join(columns(table))}; "
        f"name it one of: {', '.join(fitting)}"
    )


def _placed(name: str, folders: Sequence[Path]) -> Path:
    r"""Where a recording is: in the first folder that has it.

    Its suffix may be left out, as Common Voice and LJSpeech do; `\` separates folders on Windows.
    """
    spelt = dict.fromkeys((name, name.replace("\\", "/")))
    candidates = [folder / one for one in spelt for folder in folders]
    candidates += [path.with_name(path.name + end) for path in candidates for end in AUDIO_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _json(path: Path) -> Mapping[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise SettingsError(f"{path}: cannot be read as JSON ({error})") from error
    return row if isinstance(row, dict) else {}
