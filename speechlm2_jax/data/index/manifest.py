"""The rows of one manifest of JSON lines, by its index."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.index.counts import Counts
from speechlm2_jax.data.index.folders import state_of_file
from speechlm2_jax.data.index.mapped_rows import MappedRows
from speechlm2_jax.data.index.opening import IndexSource, open_index
from speechlm2_jax.data.index.row_columns import ROW_TYPES, SEVERAL_TYPES, SKIPPED
from speechlm2_jax.data.index.row_kinds import DUPLEX_CUTS, TXT_JSONL
from speechlm2_jax.data.index.rows import RowReader
from speechlm2_jax.data.index.texts import Text, open_text
from speechlm2_jax.data.json_lines import is_gzip
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.settings import SettingsError

_LACKING = {TXT_JSONL: "a text", DUPLEX_CUTS: "what settings ask for"}
"""What lines of a kind may lack, so that they are left out."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ManifestIndex(MappedRows):
    """The rows of a manifest: columns in mapped memory, and each row as a conversation."""

    manifest: Path
    reader: RowReader
    text: Text

    @property
    def options(self) -> ManifestOptions:
        """How rows become conversations."""
        return self.reader.options

    def conversation(self, row: int) -> Any:
        """The conversation of a row that is not skipped, read from the manifest."""
        offset, length = int(self.columns["offset"][row]), int(self.columns["length"][row])
        line = self.text.read(offset, length)
        (made,) = self.reader.conversations([(f"{self.manifest} line {row + 1}", line)])
        if made is None:
            raise SettingsError(f"{self.manifest} line {row + 1}: changed since it was indexed")
        return made


def _tell_of_skipped(reader: RowReader, flags: np.ndarray) -> None:
    """Warns of lines that are left out for what they lack. Raises SettingsError if all are."""
    lacking = _LACKING.get(reader.kind.name, "known speakers" if reader.options.roles else "")
    if not lacking:
        return
    skipped = int(np.count_nonzero(flags & SKIPPED))
    if skipped and skipped == len(flags) and reader.kind.name == TXT_JSONL:
        raise SettingsError(
            f"{reader.manifest}: no line has a text under {reader.options.text_field!r}; set "
            "text_field"
        )
    if skipped:
        _log.warning(
            "%s: %d lines, blank or without %s, are left out", reader.manifest, skipped, lacking
        )


def open_manifest(reader: RowReader, counts: Counts) -> ManifestIndex:
    """Opens the index of a manifest, which is built first if it is missing, stale or damaged.

    Raises SettingsError, naming the line, for one that cannot be read.
    """
    source = IndexSource(
        manifest=reader.manifest,
        options=reader.options,
        kind=reader.kind,
        state=partial(state_of_file, reader.manifest),
        columns=(*ROW_TYPES, *SEVERAL_TYPES),
        is_compressed=is_gzip(reader.manifest),
    )
    opened = open_index(source, counts)
    _tell_of_skipped(reader, opened.columns["flags"])
    return ManifestIndex(
        manifest=reader.manifest,
        reader=reader,
        text=open_text(reader.manifest, opened.points),
        columns=opened.columns,
        identity=opened.identity,
        folders=opened.folders,
    )
