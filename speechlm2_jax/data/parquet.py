"""Parquet files and folders of Hugging Face data sets, a recording and its text in each row.

Needs pyarrow. Texts are read at start-up; recordings stay in their files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.audio_location import AudioLocation, ParquetCell
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import ManifestRow, NemoRow, conversations_of_rows
from speechlm2_jax.data.manifest_values import near_miss, shown
from speechlm2_jax.data.paths import Finder, checked_path, expand_shards, local_file
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import SettingsError

_ROW_GROUPS_HELD = 2
"""Columns of row groups that are held, for reading in order."""
_SPLITS = ("train", "validation", "test")
_ARROW, _PARQUET = ".arrow", ".parquet"


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """Names of columns."""

    audio: str = "audio"
    """Bytes of a recording, or `{bytes, path}` as Hugging Face has them."""
    duration: str = "duration"
    """Seconds of the recording; without the column its header is read at start-up."""


def read_parquet(
    paths: Sequence[str], options: ManifestOptions, columns: ParquetColumns
) -> Iterator[Conversation]:
    """Reads files, or the files of a folder, in order.

    Args:
        paths: `.parquet` files, or folders of data sets: of the hub (`data/train-*.parquet`), or
            written by `save_to_disk` (`.arrow`).
        options: how rows become conversations.
        columns: names of columns; `options.text_field` is that of the text.

    Raises SettingsError without pyarrow, for a damaged or missing file, and for a file without the
    columns.
    """
    _arrow()
    for path in expand_shards(paths):
        for file in _files(path):
            rows = _arrow_rows if file.suffix == _ARROW else _parquet_rows
            yield from conversations_of_rows(rows(file, options, columns), options)


def cell_bytes(path: str, cell: ParquetCell) -> bytes:
    """A recording out of a Parquet file. Raises AudioError if it cannot be read."""
    import pyarrow

    try:
        value = _column(path, cell.row_group, cell.column)[cell.row].as_py()
    except (OSError, pyarrow.ArrowException, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AudioError(f"{path}: {reason}", cause="unreadable") from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise AudioError(f"{path}: no bytes in {cell.column}", cause="empty")
    return data


@lru_cache(maxsize=_ROW_GROUPS_HELD)
def _column(path: str, row_group: int, column: str) -> Any:
    with _parquet_file(path) as file:
        return file.read_row_group(row_group, columns=[column]).column(column)


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise SettingsError(
            "reading Parquet needs pyarrow; install it: pip install 'speechlm2_jax[parquet]'"
        ) from error
    return pyarrow


def _parquet_file(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


def _files(path: str) -> list[Path]:
    """A file, or those of a data set's folder."""
    if is_remote(path):
        return [local_file(path)]
    folder = Path(checked_path(path))
    if not folder.is_dir():
        return [local_file(path)]
    found = sorted(folder.rglob(f"*{_PARQUET}")) or sorted(folder.rglob(f"*{_ARROW}"))
    found = [one for one in found if not one.name.startswith(("cache-", "."))]
    if not found:
        raise SettingsError(f"{folder}: neither {_PARQUET} nor {_ARROW} files in it")
    splits = sorted({_split(folder, one) for one in found} - {""})
    if len(splits) > 1:
        raise SettingsError(
            f"{folder}: has the splits {', '.join(splits)}; name the files of one, for instance "
            f"{next(one for one in found if _split(folder, one) == splits[0])}"
        )
    return [local_file(one) for one in found]


def _split(folder: Path, file: Path) -> str:
    """The split that a file belongs to: by the folder or the first word of its name."""
    parts = file.relative_to(folder).parts
    words = [*parts[:-1], parts[-1].partition("-")[0].partition(".")[0]]
    return next((word for word in words if word in _SPLITS), "")


Rows = Iterator[tuple[str, Callable[[], ManifestRow]]]


def _parquet_rows(path: Path, options: ManifestOptions, columns: ParquetColumns) -> Rows:
    import pyarrow

    try:
        with _parquet_file(str(path)) as file:
            names = file.schema_arrow.names
            _check_columns(path, names, options, columns)
            others = [name for name in names if name != columns.audio]
            number = 0
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=others).to_pylist()
                for place, row in enumerate(rows):
                    cell = ParquetCell(group, place, columns.audio)
                    yield _row(path, number, row, AudioLocation(str(path), cell=cell), columns)
                    number += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise SettingsError(f"{path}: not Parquet, or damaged ({_reason(error)})") from error


def _arrow_rows(path: Path, options: ManifestOptions, columns: ParquetColumns) -> Rows:
    """Rows of an Arrow stream, whose recordings are stretches of the file."""
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            whole = file.read_buffer(file.size())
        with pyarrow.ipc.open_stream(whole) as stream:
            _check_columns(path, stream.schema.names, options, columns)
            for batch in stream:
                audio = batch.column(columns.audio)
                others = batch.drop_columns([columns.audio]).to_pylist()
                places = _places(path, number, audio, whole)
                for row, location in zip(others, places, strict=True):
                    yield _row(path, number, row, location, columns)
                    number += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise SettingsError(f"{path}: not Arrow, or damaged ({_reason(error)})") from error


def _places(path: Path, number: int, audio: Any, whole: Any) -> Iterator[AudioLocation]:
    """Where the bytes of a column's values are in the file, or the files that they name.

    `number` is that of the first row, `whole` the file.
    """
    import pyarrow

    is_struct = pyarrow.types.is_struct(audio.type)
    data = audio.field("bytes") if is_struct else audio
    if pyarrow.types.is_null(data.type):
        data = data.cast(pyarrow.binary())
    _, ends, values = data.buffers()
    width = np.int64 if pyarrow.types.is_large_binary(data.type) else np.int32
    bounds = np.frombuffer(ends, width)[data.offset :].tolist()
    start, held = (values.address - whole.address, values.size) if values is not None else (0, 0)
    finder = Finder(path)
    for place, has_bytes in enumerate(data.is_valid().to_pylist()):
        where = f"{path} row {number + place}"
        if has_bytes:
            if not 0 <= start <= whole.size - held:
                raise SettingsError(f"{where}: the file is compressed; save it without compression")
            size = bounds[place + 1] - bounds[place]
            yield AudioLocation(str(path), (start + bounds[place], size))
            continue
        name = audio.field("path")[place].as_py() if is_struct else None
        if not name:
            raise SettingsError(f"{where}: audio has neither bytes nor a path; leave the row out")
        yield AudioLocation(finder(name), storage=finder.storage)


def _row(
    path: Path,
    number: int,
    row: dict[str, Any],
    location: AudioLocation,
    columns: ParquetColumns,
) -> tuple[str, Callable[[], ManifestRow]]:
    name = row.get("id")
    seconds = row.pop(columns.duration, None)
    fields = {
        **row,
        "id": str(f"{path.stem}_{number}" if name is None else name),
        "audio_filepath": str(f"{path.stem}_{number}" if name is None else name),
        "duration": seconds,
    }
    make = partial(NemoRow, fields, lambda _: location, is_packed=True, trusts_duration=True)
    return f"{path} row {number}", make


def _check_columns(
    path: Path, names: Sequence[str], options: ManifestOptions, columns: ParquetColumns
) -> None:
    keys = {"audio_field": columns.audio}
    if not options.with_question:
        keys["text_field"] = options.text_field
    for key, name in keys.items():
        if name not in names:
            near = near_miss(dict.fromkeys(names), key.removesuffix("_field")) or "NAME"
            raise SettingsError(
                f"{path}: no column {name!r}; set {key}: {near} (columns: "
                f"{shown(', '.join(names))})"
            )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
