"""Lines of a manifest as conversations, whatever the line's place in the file."""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.cuts import clip_of_cut, conversation_of_cut, cut_of_row, is_whole
from speechlm2_jax.data.headers import file_durations_s
from speechlm2_jax.data.index.texts import can_index
from speechlm2_jax.data.json_lines import json_lines, object_of_line
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import DialogRow, Lengths, ManifestRow, NemoRow
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import Finder
from speechlm2_jax.data.readers import CUT_KEYS
from speechlm2_jax.settings import SettingsError

_FIRST_ROWS = 512
"""The first relative path of these tells where the recordings of a manifest are."""
Line = tuple[str, bytes]
"""The words that name a line, and the line without its end."""


class RowReader:
    """Reads lines of one manifest, in any order and from any thread.

    Args:
        manifest: its path.
        options: how rows become conversations.
        kind: of its rows, as `kind_of` tells it.
    """

    def __init__(self, manifest: Path, options: ManifestOptions, kind: str) -> None:
        self.manifest, self.options, self.kind = manifest, options, kind
        self._finder = Finder(manifest)
        for where, row in itertools.islice(json_lines(manifest), _FIRST_ROWS):
            with suppress(SettingsError), located(where):  # told when the row's turn comes
                self._row(row)

    def conversations(
        self, lines: Iterable[Line], *, with_lengths: bool = True
    ) -> list[Conversation | None]:
        """The conversation of each line; None for a blank one and one to be skipped.

        Without lengths no header of a recording is read, and durations may be wrong. Raises
        SettingsError, naming the line.
        """
        rows = [(where, self._parsed(where, line)) for where, line in lines]
        names = [name for _, row in rows if row is not None for name in row.unmeasured_files]
        lengths = file_durations_s(names) if with_lengths else dict.fromkeys(names, 1.0)
        made: list[Conversation | None] = []
        for where, row in rows:
            with located(where):
                one = None if row is None else row.conversation(lengths, self.options, where)
            made.append(one)
        return made

    def _parsed(self, where: str, line: bytes) -> ManifestRow | None:
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            return None
        row = object_of_line(where, line)
        if self.kind != "cuts" and row.pop("_skipme", False):
            return None
        with located(where):
            return self._row(row)

    def _row(self, row: dict[str, Any]) -> ManifestRow:
        if self.kind == "cuts":
            return _CutRow(row, self._finder)
        return (DialogRow if self.kind == "dialogs" else NemoRow)(row, self._find)

    def _find(self, name: str) -> AudioLocation:
        return AudioLocation(self._finder(name), storage=self._finder.storage)


class _CutRow:
    """A Lhotse cut, whose lengths are its manifest's."""

    unmeasured_files: tuple[AudioLocation, ...] = ()

    def __init__(self, row: dict[str, Any], finder: Finder) -> None:
        self._cut, self._storage = cut_of_row(row, (), finder), finder.storage

    def conversation(self, lengths: Lengths, options: ManifestOptions, where: str) -> Conversation:
        clip = clip_of_cut(self._cut, options.channel, self._storage)
        return conversation_of_cut(self._cut, clip, options, where=where)


def kind_of(manifest: Path) -> str | None:
    """`nemo`, `dialogs` or `cuts` by the first line; None for what has no lines that can be read.

    Those are read as a whole, and their errors told, where they are small.
    """
    if is_whole(manifest) or not can_index(manifest):
        return None
    try:
        first = next(json_lines(manifest), None)
    except SettingsError:
        return None
    if first is None:
        return None
    _, row = first
    for key, kind in (("conversations", "dialogs"), ("audio_filepath", "nemo")):
        if key in row:
            return kind
    return "cuts" if any(key in row for key in CUT_KEYS) else None


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
