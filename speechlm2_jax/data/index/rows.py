"""Lines of a manifest as conversations, whatever the line's place in the file."""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from speechlm2_jax.data.cuts import is_whole
from speechlm2_jax.data.duplex.forms import DuplexForm
from speechlm2_jax.data.entry_readers import placeholders_of
from speechlm2_jax.data.headers import file_durations_s
from speechlm2_jax.data.index.row_kinds import (
    CUTS,
    DIALOGS,
    DUPLEX_CUTS,
    NEMO,
    SFT,
    SHARE_GPT,
    TXT,
    TXT_JSONL,
    RowKind,
    RowMaker,
)
from speechlm2_jax.data.index.texts import can_index
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import ManifestRow
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import expand_shards, local_files
from speechlm2_jax.data.readers import CUT_KEYS
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.settings import SettingsError

_FIRST_ROWS = 512
"""The first relative path of these tells where the recordings of a manifest are.

If one of them is not allowed, the manifest is refused, of which an older index may exist.
"""
Line = tuple[str, bytes]
"""The words that name a line, and the line without its end."""


class RowReader:
    """Reads lines of one manifest, in any order and from any thread.

    Args:
        manifest: its path.
        options: how rows become conversations.
        kind: of its rows.

    Raises StorageError if settings do not allow the recording of one of the first rows.
    """

    def __init__(self, manifest: Path, options: ManifestOptions, kind: RowKind) -> None:
        self.manifest, self.options, self.kind = manifest, options, kind
        self._rows = RowMaker(manifest, options, kind)
        first = json_lines(manifest) if kind.has_recordings else iter(())
        for where, row in itertools.islice(first, _FIRST_ROWS):
            try:
                self._rows.of_object(where, row)
            except StorageError as error:
                if error.cause == "not_allowed":
                    raise
            except SettingsError:  # told when the row's turn comes
                pass

    def conversations(self, lines: Iterable[Line], *, with_lengths: bool = True) -> list[Any]:
        """The conversation of each line; None for a blank one and one to be skipped.

        Without lengths no header of a recording is read, and durations may be wrong. Raises
        SettingsError, naming the line.
        """
        rows = [(where, self._parsed(where, line)) for where, line in lines]
        names = [name for _, row in rows if row is not None for name in row.unmeasured_files]
        lengths = file_durations_s(names) if with_lengths else dict.fromkeys(names, 1.0)
        made: list[Any] = []
        for where, row in rows:
            with located(where):
                one = None if row is None else row.conversation(lengths, self.options, where)
                made.append(self.kind.finished(one))
        return made

    def _parsed(self, where: str, line: bytes) -> ManifestRow | None:
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            return None
        return self._rows(where, line)


def readers_of(
    entry: InputConfig, options: ManifestOptions, duplex: DuplexForm | None = None
) -> list[RowReader] | None:
    """What reads the lines of each file of an entry; None if any has no lines that can be read.

    Those are read as a whole, and their errors told, where they are small.
    """
    readers: list[RowReader] = []
    for path in local_files(expand_shards(entry.line_files)):
        kind = _kind_of(entry, path, options, duplex) if can_index(path) else None
        if kind is None:
            return None
        readers.append(RowReader(path, options, replace(kind, duplex=duplex)))
    return readers or None


def _kind_of(
    entry: InputConfig, path: Path, options: ManifestOptions, duplex: DuplexForm | None
) -> RowKind | None:
    """What the lines of a file are: by its type, or by the first line."""
    if entry.type in (TXT, TXT_JSONL, SFT):
        return RowKind(name=entry.type)
    if entry.type == SHARE_GPT:
        return RowKind(
            name=SHARE_GPT, placeholders=placeholders_of(entry), audio_root=entry.audio_root
        )
    if is_whole(path):
        return None
    if duplex is not None and duplex.reads_cuts:
        return RowKind(name=DUPLEX_CUTS)
    try:
        _, row = next(json_lines(path), ("", {}))
    except SettingsError:
        return None
    if "conversations" in row:
        return RowKind(name=DIALOGS)
    if "audio_filepath" in row:  # which has no speakers: that is told where it is read
        return None if options.roles is not None else RowKind(name=NEMO)
    return RowKind(name=CUTS) if any(key in row for key in CUT_KEYS) else None


def lines_of(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """The offset of each line of a stretch of a file that begins at `start`, and the line.

    Lines end as in `json_lines`; a blank one counts.
    """
    if b"\r" not in data:
        lines = data.split(b"\n")
        for line in lines if lines[-1] else lines[:-1]:
            yield start, line
            start += len(line) + 1
        return
    for raw in data.splitlines(keepends=True):
        yield start, raw.rstrip(b"\r\n")
        start += len(raw)
