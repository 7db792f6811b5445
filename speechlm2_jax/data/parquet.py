"""Parquet files and folders of Hugging Face data sets, a recording and its text in each row.

Needs pyarrow. Texts are read at start-up, or, of large data, row by row; recordings stay in their
files.
"""

import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.audio_location import AudioLocation, ParquetCell
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import NamedRow, NemoRow, conversations_of_rows
from speechlm2_jax.data.manifest_values import near_miss, shown
from speechlm2_jax.data.paths import Finder, checked_path, expand_shards, local_file
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import SettingsError

_ROW_GROUPS_HELD = 2
"""Columns of row groups that are held, for reading in order."""
_TABLES_HELD = 64
"""Files whose metadata are held."""
_ROW_BYTES = 256
"""Of a row without its recording, where that is not known."""
_SPLITS = ("train", "validation", "test")
_ARROW, _PARQUET = ".arrow", ".parquet"


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """Names of columns."""

    audio: str = "audio"
    """Bytes of a recording, or `{bytes, path}` as Hugging Face has them."""
    duration: str = "duration"
    """Seconds of the recording; without the column its header is read at start-up."""


def table_columns(entry: InputConfig) -> ParquetColumns:
    """The columns that an entry names."""
    return ParquetColumns(audio=entry.audio_field, duration=entry.duration_field)


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
    for table in open_tables(paths, options, columns):
        for group in range(len(table.groups)):
            yield from conversations_of_rows(table.rows(group, columns), options)


def open_tables(
    paths: Sequence[str], options: ManifestOptions, columns: ParquetColumns
) -> "Iterator[GroupedTable]":
    """The tables of files, or of folders, in order; none of their rows is read.

    Raises SettingsError as `read_parquet`.
    """
    _arrow()
    for path in expand_shards(paths):
        for file in _files(path):
            table = open_table(file)
            _check_columns(file, table.names, options, columns)
            yield table


def rows_of_tables(path: str, most: int) -> int:
    """Rows of a file or a folder, up to `most` or some more. Raises SettingsError."""
    _arrow()
    rows = 0
    for file in _files(path):
        if rows >= most:
            break
        rows += sum(open_table(file).groups)
    return rows


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


def _parquet_file(path: str, metadata: Any = None) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, metadata=metadata)


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


class GroupedTable(ABC):
    """A file of rows in groups, each of which is read alone."""

    path: Path
    names: Sequence[str]
    """Of its columns."""
    groups: Sequence[int]
    """Rows of each group: a row group of Parquet, a batch of Arrow."""

    def rows(
        self, group: int, columns: ParquetColumns, place: int | None = None
    ) -> Iterator[NamedRow]:
        """The rows of a group, or the one at a place in it.

        Raises SettingsError, naming the file, where it is damaged.
        """
        import pyarrow

        start = 0 if place is None else place
        if place is not None and not (group < len(self.groups) and place < self.groups[group]):
            raise SettingsError(f"{self.path}: no row {place} in group {group}")
        count = self.groups[group] if place is None else 1
        first = self._firsts[group] + start
        try:
            others = self._others(group, columns.audio).slice(start, count).to_pylist()
            locations = self._locations(group, columns.audio, start, count)
            for number, (row, location) in enumerate(zip(others, locations, strict=True), first):
                yield _row(self.path, number, row, location, columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise damaged(self.path, error) from error

    def text_bytes(self, group: int, audio: str) -> int:
        """Bytes of a group without its recordings, about."""
        return self.groups[group] * _ROW_BYTES

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """The number of the first row of each group."""
        return list(itertools.accumulate(self.groups, initial=0))

    @abstractmethod
    def _others(self, group: int, audio: str) -> Any:
        """The columns of a group but for that of recordings."""
        ...

    @abstractmethod
    def _locations(self, group: int, audio: str, start: int, count: int) -> Iterator[AudioLocation]:
        """Where the recordings of some rows of a group are."""
        ...


class _ParquetTable(GroupedTable):
    def __init__(self, path: Path) -> None:
        with _parquet_file(str(path)) as file:
            self._metadata = file.metadata
            self.names = file.schema_arrow.names
        count = self._metadata.num_row_groups
        self.path = path
        self.groups = [self._metadata.row_group(group).num_rows for group in range(count)]
        self._read = functools.lru_cache(_ROW_GROUPS_HELD)(self._read_others)

    def text_bytes(self, group: int, audio: str) -> int:
        found = self._metadata.row_group(group)
        columns = (found.column(number) for number in range(found.num_columns))
        return sum(
            one.total_uncompressed_size
            for one in columns
            if one.path_in_schema.partition(".")[0] != audio
        )

    def _others(self, group: int, audio: str) -> Any:
        return self._read(group, audio)

    def _read_others(self, group: int, audio: str) -> Any:
        names = [name for name in self.names if name != audio]
        with _parquet_file(str(self.path), self._metadata) as file:
            return file.read_row_group(group, columns=names)

    def _locations(self, group: int, audio: str, start: int, count: int) -> Iterator[AudioLocation]:
        for place in range(start, start + count):
            yield AudioLocation(str(self.path), cell=ParquetCell(group, place, audio))


class _ArrowTable(GroupedTable):
    """An Arrow stream in mapped memory, whose recordings are stretches of the file."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        with pyarrow.memory_map(str(path)) as file:
            self._whole = file.read_buffer(file.size())
        with pyarrow.ipc.open_stream(self._whole) as stream:
            self.names = stream.schema.names
            self._batches = list(stream)
        self.path = path
        self.groups = [batch.num_rows for batch in self._batches]

    def _others(self, group: int, audio: str) -> Any:
        return self._batches[group].drop_columns([audio])

    def _locations(self, group: int, audio: str, start: int, count: int) -> Iterator[AudioLocation]:
        values = self._batches[group].column(audio).slice(start, count)
        return _places(self.path, self._firsts[group] + start, values, self._whole)


def open_table(path: Path) -> GroupedTable:
    """Opens a file of Parquet or Arrow, if it is not open as it is now.

    Raises SettingsError for a damaged one.
    """
    status = os.stat(path)
    return _opened(path, (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=_TABLES_HELD)
def _opened(path: Path, state: tuple[int, int]) -> GroupedTable:
    import pyarrow

    try:
        return (_ArrowTable if path.suffix == _ARROW else _ParquetTable)(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> SettingsError:
    """What to say of a file that cannot be read."""
    kind = "Arrow" if path.suffix == _ARROW else "Parquet"
    reason = " ".join(str(error).split())[:200]
    return SettingsError(f"{path}: not {kind}, or damaged ({reason})")


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
) -> NamedRow:
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
