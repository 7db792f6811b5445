"""The index of one manifest of JSON lines: found, or built, and opened."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.console import phase
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.build import bar_of, read_chunks, remove_chunks
from speechlm2_jax.data.index.folders import (
    digest,
    index_folders,
    locked,
    state_of_file,
    writable,
)
from speechlm2_jax.data.index.row_columns import PROMPT_TYPES, ROW_TYPES, SEVERAL_TYPES
from speechlm2_jax.data.index.rows import RowReader
from speechlm2_jax.data.index.storage import (
    ColumnError,
    open_columns,
    read_meta,
    write_columns,
)
from speechlm2_jax.data.index.texts import POINTS, Text, open_text, write_points
from speechlm2_jax.data.index.worker import Job, PromptSettings
from speechlm2_jax.data.json_lines import is_gzip
from speechlm2_jax.data.prompts import PromptError, PromptFormatter
from speechlm2_jax.settings import SettingsError

VERSION = 1
"""Of what is in an index; another one is built again."""
_OF_NO_PROMPT = ("token_equivalent_duration_s", "channel", "skip_missing")
"""Fields of ManifestOptions that change no token."""
_PROBE_TEXT = "Ein Beispiel, 2 tests: naïve \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442!"
_PROBE_TURNS = (("system", "a b"), ("user", "c d"), ("assistant", "e f"), ("user", "g"))

_log = logging.getLogger(__name__)


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
    manifest = reader.manifest
    folders, state = index_folders(manifest), state_of_file(manifest)
    key = digest(_prompt_key(reader, prompts))
    wanted = {"version": VERSION, "kind": reader.kind, "file": state}
    names = ("rows", f"prompts-{key}", *((POINTS,) if is_gzip(manifest) else ()))
    found = _all_found(folders, names, wanted)
    if not all(found.values()):
        folder = writable(folders)
        with locked(folder), phase(f"indexing {manifest}"):
            found = _all_found(folders, names, wanted)
            _build(folder, reader, prompts, wanted, found)
        if state_of_file(manifest) != state:
            raise SettingsError(f"{manifest}: changed while it was read; start again")
        found = _all_found(folders, names, wanted)
    if not all(found.values()):
        raise SettingsError(f"{writable(folders)}: the index of {manifest} cannot be read back")
    columns = {name: column for one in names[:2] for name, column in _columns(found[one]).items()}
    points = found.get(POINTS)
    return ManifestIndex(
        manifest=manifest,
        reader=reader,
        text=open_text(manifest, points and points[0]),
        columns=columns,
        identity=digest([wanted, key]),
        folders=folders,
    )


def _build(
    folder: Path,
    reader: RowReader,
    prompts: PromptSettings,
    wanted: Mapping[str, Any],
    found: "Mapping[str, _Found | None]",
) -> None:
    """Builds those columns that are missing."""
    missing = {name for name, one in found.items() if one is None}
    with_rows = "rows" in missing
    counts = next((name for name in missing if name not in ("rows", POINTS)), None)
    chunks = folder / f"building-{digest([wanted, sorted(missing - {POINTS})])}"
    if with_rows:
        _remove_stale(folder, wanted, chunks)
    if POINTS in missing:
        with bar_of(f"unpacking {reader.manifest.name}", wanted["file"]["bytes"]) as bar:
            write_points(reader.manifest, folder / POINTS, wanted, bar.update)
    if not missing - {POINTS}:
        return
    known = found.get(POINTS)
    points = (known[0] if known else folder / POINTS) if POINTS in found else None
    job = Job(
        manifest=reader.manifest,
        options=reader.options,
        kind=reader.kind,
        points=points,
        with_rows=with_rows,
        prompts=prompts if counts is not None else None,
    )
    parts = read_chunks(chunks, job, open_text(reader.manifest, points).size)
    if with_rows:
        write_columns(folder / "rows", parts, (*ROW_TYPES, *SEVERAL_TYPES), wanted)
    if counts is not None:
        write_columns(folder / counts, parts, PROMPT_TYPES, wanted)
    remove_chunks(chunks)


def _remove_stale(folder: Path, wanted: Mapping[str, Any], chunks: Path) -> None:
    """Removes what was made of rows that are built again, but for the chunks of this build."""
    for other in (*folder.glob("plan-*"), *folder.glob("prompts-*"), *folder.glob("building-*")):
        meta = read_meta(other) or {}
        if other != chunks and meta.get("file") != wanted["file"]:
            shutil.rmtree(other, ignore_errors=True)


_Found = tuple[Path, dict[str, np.ndarray]]
"""A folder, and its columns."""


def _all_found(
    folders: tuple[Path, ...], names: Sequence[str], wanted: Mapping[str, Any]
) -> dict[str, _Found | None]:
    """Each name in the first folder that has it as it is wanted; None for none."""
    return {
        name: next(filter(None, (_found(folder / name, wanted) for folder in folders)), None)
        for name in names
    }


def _found(folder: Path, wanted: Mapping[str, Any]) -> _Found | None:
    meta = read_meta(folder)
    if meta is None or any(meta.get(key) != value for key, value in wanted.items()):
        return None
    try:
        return folder, open_columns(folder, meta)
    except (ColumnError, KeyError, TypeError) as error:
        _log.warning("%s is damaged and is built again: %s", folder, error)
        return None


def _columns(found: _Found | None) -> dict[str, np.ndarray]:
    return {} if found is None else found[1]


def _prompt_key(reader: RowReader, prompts: PromptSettings) -> list[Any]:
    """What token counts depend on, beside the manifest."""
    tokenizer, options = prompts.tokenizer, asdict(reader.options)
    formatter = PromptFormatter(prompts.prompt_format, tokenizer)
    return [
        VERSION,
        *(tokenizer.contents, len(tokenizer), sorted(tokenizer.added_tokens)),
        tokenizer.text_to_ids(_PROBE_TEXT),
        *(formatter.name, tokenizer.chat_template, prompts.placeholder_id),
        [_probed(formatter, count) for count in range(1, len(_PROBE_TURNS) + 1)],
        {name: value for name, value in options.items() if name not in _OF_NO_PROMPT},
    ]


def _probed(formatter: PromptFormatter, count: int) -> int | None:
    """The length of a prompt, which may change with the day if a template writes the date."""
    try:
        return len(formatter.encode_dialog(formatter.dialog(_PROBE_TURNS[:count])).input_ids)
    except PromptError:
        return None
