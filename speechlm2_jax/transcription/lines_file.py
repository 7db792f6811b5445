"""transcripts.jsonl: one row for each recording, added as they are transcribed."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import SettingsError

LINES_FILE = "transcripts.jsonl"
KEYS = ("audio_filepath", "offset", "channel", "place")
"""What names the recording of a row."""


def key_of(row: Mapping[str, Any], folder: Path) -> str:
    """The recording of a row of a file in `folder`, as a text; its path is absolute there.

    Raises KeyError for a row without one.
    """
    name = row["audio_filepath"]
    if not is_remote(name):
        name = os.path.abspath(folder / name)
    named = {key: row[key] for key in KEYS if row.get(key) is not None}
    return json.dumps(named | {"audio_filepath": name}, ensure_ascii=False)


class LinesFile:
    """A file of rows; a row replaces an earlier one of its recording when the file is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: set[str] | None = None
        self._has_two = False

    def written(self) -> set[str]:
        """The recordings that have a row.

        A last line that was not written whole is removed, and so are rows that a later one
        replaces. Raises SettingsError for a file of another kind.
        """
        if self._keys is None:
            self._keys = _tidy(self.path)
        return self._keys

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row at the end. Raises OSError."""
        key = key_of(row, self.path.parent)
        self._has_two |= key in self.written()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.written().add(key)

    def close(self) -> None:
        """Removes the rows that were replaced; all others stay."""
        if self._has_two:
            self._keys, self._has_two = _tidy(self.path), False


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all. Raises OSError that names it."""
    # a hash, as a name may be as long as the file system allows
    digest = hashlib.blake2s(os.fsencode(path.name), digest_size=8).hexdigest()
    part = path.with_name(f".{digest}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the draft
        raise
    finally:
        with suppress(OSError):  # where even the draft could not be made
            part.unlink(missing_ok=True)


def _tidy(path: Path) -> set[str]:
    """Leaves one whole row for each recording, the last; returns the keys."""
    if not path.is_file():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [line for line in whole.split(b"\n") if line]
        rows = {key_of(json.loads(line), path.parent): line + b"\n" for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{path}: is not a file of transcripts ({error}); move it, or name another --output-dir"
        ) from error
    if (tidy := b"".join(rows.values())) != content:
        write_whole(path, tidy)
    return set(rows)
