"""Files of one JSON object per line, plain or compressed, read so that each fault has its line."""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from io import IOBase
from pathlib import Path
from typing import Any

from speechlm2_jax.data.storage.downloads import shown
from speechlm2_jax.settings import SettingsError, decode_text, parse_json

_GZIP_MAGIC = b"\x1f\x8b"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMED = 40
"""Letters of a faulty text that an error shows."""


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file, with the words that name its line (counted from 1, blank ones too).

    Lines end as in a Python text file: with LF, CR LF or CR alone. A byte order mark is left out,
    also of a later line: files are joined by `cat`. A file is decompressed if its content is
    gzip's, whatever its name.

    Raises SettingsError, naming the line, for one that is no object in JSON or whose text holds
    half of a surrogate pair; and naming the file, for one that is damaged.
    """
    name = shown(path)
    for number, line in _numbered(path):
        where = f"{name} line {number}"
        yield where, object_of_line(where, line)


def object_of_line(where: str, line: bytes) -> dict[str, Any]:
    """The object that a line holds. Raises SettingsError, naming `where`, as `json_lines` does."""
    try:
        text = decode_text(line)
        row = parse_json(text.strip())
        if not isinstance(row, dict):
            raise SettingsError("not a JSON object; each line holds one")
        if _SURROGATE.search(text):
            check_surrogates(row)
    except SettingsError as error:
        reason = str(error).replace(": line 1 column", ": column")  # the file's line is named
        raise SettingsError(f"{where}: {reason}") from None
    return row


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a text file without its end, blank ones too, with the words that name it.

    A file is decompressed as in `json_lines`. Raises SettingsError, naming the line, for text that
    is not UTF-8, and naming the file for one that is damaged.
    """
    name = shown(path)
    for number, line in _numbered(path, with_blank=True):
        where = f"{name} line {number}"
        yield where, decoded_line(where, line)


def decoded_line(where: str, line: bytes) -> str:
    """The text of a line. Raises SettingsError, naming `where`, for one that is not UTF-8."""
    try:
        return decode_text(line)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from None


def _numbered(path: Path, *, with_blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """The lines, or those that are not blank. Raises SettingsError for a damaged file."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(_lines(file), start=1):
                if with_blank or line.removeprefix(codecs.BOM_UTF8).strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{shown(path)}: damaged after line {number} ({reason})") from error


def _lines(file: IOBase) -> Iterator[bytes]:
    """Every line without its end; JSON holds no bare CR inside a text."""
    for line in file:
        yield from line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def _opened(path: Path) -> IOBase:
    return gzip.open(path, "rb") if is_gzip(path) else open(path, "rb")


def is_gzip(path: Path) -> bool:
    """Whether the content of a file is compressed by gzip."""
    with open(path, "rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def check_surrogates(parsed: object) -> None:
    r"""Raises SettingsError for half of a pair, as `"\ud83d"` alone: no tokenizer encodes it.

    All texts of a value of JSON are checked, the names of its fields too.
    """
    for value in _texts(parsed):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            around = ascii(value[max(error.start - _NAMED, 0) : error.end])
            raise SettingsError(
                f"{around} ends in half of a surrogate pair, which is no letter; remove it"
            ) from None


def _texts(value: object) -> Iterator[str]:
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, list):
            todo += one
