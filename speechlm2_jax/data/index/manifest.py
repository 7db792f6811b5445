"""The rows of one manifest of JSON lines, by its index."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.folders import state_of_file
from speechlm2_jax.data.index.opening import IndexSource, open_index
from speechlm2_jax.data.index.row_columns import ROW_TYPES, SEVERAL_TYPES
from speechlm2_jax.data.index.rows import RowReader
from speechlm2_jax.data.index.texts import Text, open_text
from speechlm2_jax.data.index.worker import PromptSettings
from speechlm2_jax.data.json_lines import is_gzip
from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class ManifestIndex:
    """The rows of a manifest: columns in mapped memory, and each row as a conversation."""

    manifest: Path
    reader: RowReader
    text: Text
    columns: Mapping[str, np.ndarray]
    """Those of `row_columns`."""
    identity: str
    """Changes with the manifest, and with what its token counts depend on."""
    folders: tuple[Path, ...]
    """Where the index and what belongs to it may be."""

    def __len__(self) -> int:
        return len(self.columns["flags"])

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token."""
        return self.reader.options.token_equivalent_duration_s

    @property
    def locator_tags(self) -> frozenset[str]:
        """The token that stands for a recording."""
        return frozenset({self.reader.options.locator_tag})

    def conversation(self, row: int) -> Conversation:
        """The conversation of a row that is not skipped, read from the manifest."""
        offset, length = int(self.columns["offset"][row]), int(self.columns["length"][row])
        line = self.text.read(offset, length)
        (made,) = self.reader.conversations([(f"{self.manifest} line {row + 1}", line)])
        if made is None:
            raise SettingsError(f"{self.manifest} line {row + 1}: changed since it was indexed")
        return made


def open_manifest(reader: RowReader, prompts: PromptSettings) -> ManifestIndex:
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
    opened = open_index(source, prompts)
    return ManifestIndex(
        manifest=reader.manifest,
        reader=reader,
        text=open_text(reader.manifest, opened.points),
        columns=opened.columns,
        identity=opened.identity,
        folders=opened.folders,
    )
