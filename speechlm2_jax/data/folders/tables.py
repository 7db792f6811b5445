"""CSV, TSV and JSON-lines tables of recordings and texts -> their rows, as people write them."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speechlm2_jax.data.json_lines import json_lines, text_lines
from speechlm2_jax.settings import SettingsError

STRETCH_COLUMNS = (
    *("start", "end", "offset", "begin", "start_time", "end_time", "start_s", "end_s"),
    *("start_ms", "end_ms", "segment_start", "segment_end"),
)
"""Columns of tables whose rows are stretches of recordings."""
_JSON_LINES = ".jsonl"
_LARGEST_FIELD = 1 << 20


def columns(table: Path) -> tuple[str, ...]:
    """The names of a table's columns; none for an empty table."""
    if table.suffix == _JSON_LINES:
        first = next(json_lines(table), None)
        return () if first is None else tuple(first[1])
    head = next((line for _, line in text_lines(table) if line.strip()), "")
    return tuple(name.strip() for name in next(csv.reader([head], **_form(table, head)), []))


def records(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a table by column, with the words that name each line.

    Raises SettingsError, naming the line, for a row with more fields than the head and for quotes
    that do not close: the rest of such a text would be lost, or the next rows be part of it. Raises
    it too for a head that names a column twice, of which only one would be read.
    """
    if table.suffix == _JSON_LINES:
        yield from json_lines(table)
        return
    csv.field_size_limit(_LARGEST_FIELD)
    lines = [line for _, line in text_lines(table)]
    blank = next((n for n, line in enumerate(lines) if line.strip()), 0)
    form = _form(table, "".join(lines[blank : blank + 1]))
    reader = csv.DictReader([f"{line}\n" for line in lines[blank:]], strict=True, **form)
    try:
        _check_names(table, reader.fieldnames or ())
        for row in reader:
            where = f"{table} line {blank + reader.line_num}"
            _check_fields(where, row, form["delimiter"])
            yield where, {k.strip(): _unquoted(v, form) for k, v in row.items() if k is not None}
    except csv.Error as error:
        line = blank + reader.reader.line_num
        raise SettingsError(
            f"{table} line {line}: {error}; a text with quotes is written in quotes, with each of "
            'its own doubled, as "say ""yes"""'
        ) from error


def _check_names(table: Path, names: Sequence[str]) -> None:
    """Raises SettingsError for a name that stands twice; case and spaces around do not count."""
    counts = Counter(name.strip().lower() for name in names)
    if twice := [name for name, count in counts.items() if name and count > 1]:
        raise SettingsError(
            f"{table}: the head names the column {twice[0]!r} {counts[twice[0]]} times; rename or "
            "remove all but one"
        )


def _check_fields(where: str, row: Mapping[Any, Any], delimiter: str) -> None:
    """Raises SettingsError for a row with more fields than the head, unless they are empty."""
    if any(extra.strip() for extra in row.get(None) or ()):
        head = len(row) - 1
        is_tab = delimiter == "\t"
        fix = "take the tabs out of the texts" if is_tab else "put it in double quotes"
        raise SettingsError(
            f"{where}: {head + len(row[None])} fields, but the head has {head}; does a text hold "
            f"{'a tab' if is_tab else repr(delimiter)}? {fix}"
        )


def _form(table: Path, head: str) -> dict[str, Any]:
    """How a table is written: by its suffix, or the separator that its head has most often."""
    if table.suffix.lower() == ".tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    separator = max(",;|\t", key=head.count)
    return {"delimiter": separator if head.count(separator) else ","}


def _unquoted(value: Any, form: Mapping[str, Any]) -> Any:
    """A field of a TSV without the quotes that spreadsheets write around it, its own doubled."""
    if form.get("quoting") != csv.QUOTE_NONE or not isinstance(value, str) or len(value) < 2:
        return value
    inner = value[1:-1].replace('""', "")
    is_quoted = value[0] == value[-1] == '"' and '"' not in inner
    return value[1:-1].replace('""', '"') if is_quoted else value


def first_of(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The name that comes first in `wanted`, whatever its case."""
    present = {name.lower(): name for name in names}
    return next((present[name] for name in wanted if name in present), None)


def value_of(where: str, row: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    """The text in the first of the wanted columns; None if there is none.

    Raises SettingsError for a list or an object, whose spelling in Python is no text.
    """
    name = first_of(row, wanted)
    return None if name is None else text_of(where, name, row[name])


def text_of(where: str, name: str, value: object) -> str | None:
    """A value as text with single spaces; None for null and NaN. Errors as `value_of`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        kind = "a list" if isinstance(value, list) else "an object"
        raise SettingsError(f"{where}: {name!r} is {kind}; it must be a text")
    return " ".join(str(value).split())
