"""Finds, or builds, the columns of an index, and opens them."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.console import phase
from speechlm2_jax.data.index.build import bar_of, read_chunks, remove_chunks
from speechlm2_jax.data.index.counts import VERSION, Counts
from speechlm2_jax.data.index.folders import (
    digest,
    index_folders,
    locked,
    told_of_full_disk,
    writable,
)
from speechlm2_jax.data.index.packed_rows import PackedShard
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.index.storage import ColumnError, open_columns, read_meta, write_columns
from speechlm2_jax.data.index.texts import POINTS, open_text, write_points
from speechlm2_jax.data.index.worker import Job
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.settings import SettingsError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexSource:
    """What an index is made of."""

    manifest: Path
    """The one beside which it lies: the only one, or the first."""
    options: ManifestOptions
    kind: RowKind
    """Of its rows."""
    state: Callable[[], Mapping[str, Any]]
    """How its files are now; `bytes` are those of the manifests."""
    columns: tuple[str, ...]
    """Of its rows."""
    is_compressed: bool = False
    """Whether its text needs points that reading starts from."""
    shards: tuple[PackedShard, ...] = ()
    """Of packed recordings."""


@dataclass(frozen=True, kw_only=True)
class OpenedIndex:
    """Columns in mapped memory."""

    columns: Mapping[str, np.ndarray]
    points: Path | None
    """The folder of the points of a compressed manifest."""
    identity: str
    """Changes with the manifest, and with what its token counts depend on."""
    folders: tuple[Path, ...]
    """Where the index and what belongs to it may be."""


def open_index(source: IndexSource, counts: Counts) -> OpenedIndex:
    """Opens an index, which is built first if it is missing, stale or damaged.

    Raises SettingsError, naming the line, for one that cannot be read.
    """
    folders, state = index_folders(source.manifest), source.state()
    key = digest(counts.key(source.options))
    wanted = {"version": VERSION, "kind": source.kind.key(source.options), "file": state}
    names = ("rows", f"{counts.NAME}-{key}", *((POINTS,) if source.is_compressed else ()))
    found = _all_found(folders, names, wanted)
    if not all(found.values()):
        folder = writable(folders)
        with (
            locked(folder),
            told_of_full_disk(folder, f"the index of {source.manifest}"),
            phase(f"indexing {source.manifest}"),
        ):
            found = _all_found(folders, names, wanted)
            _build(folder, source, counts, wanted, found)
        if source.state() != state:
            raise SettingsError(f"{source.manifest}: changed while it was read; start again")
        found = _all_found(folders, names, wanted)
    if not all(found.values()):
        place = writable(folders)
        raise SettingsError(f"{place}: the index of {source.manifest} cannot be read back")
    columns = {name: column for one in names[:2] for name, column in _columns(found[one]).items()}
    points = found.get(POINTS)
    return OpenedIndex(
        columns=columns,
        points=points and points[0],
        identity=digest([wanted, key]),
        folders=folders,
    )


def _build(
    folder: Path,
    source: IndexSource,
    counts: Counts,
    wanted: Mapping[str, Any],
    found: "Mapping[str, _Found | None]",
) -> None:
    """Builds those columns that are missing."""
    missing = {name for name, one in found.items() if one is None}
    with_rows = "rows" in missing
    counted = next((name for name in missing if name not in ("rows", POINTS)), None)
    chunks = folder / f"building-{digest([wanted, sorted(missing - {POINTS})])}"
    if with_rows:
        _remove_stale(folder, wanted, chunks)
    if POINTS in missing:
        with bar_of(f"unpacking {source.manifest.name}", wanted["file"]["bytes"]) as bar:
            write_points(source.manifest, folder / POINTS, wanted, bar.update)
    if not missing - {POINTS}:
        return
    known = found.get(POINTS)
    points = (known[0] if known else folder / POINTS) if POINTS in found else None
    job = Job(
        manifest=source.manifest,
        options=source.options,
        kind=source.kind,
        points=points,
        shards=source.shards,
        with_rows=with_rows,
        counts=counts if counted is not None else None,
    )
    size = wanted["file"]["bytes"] if source.shards else open_text(source.manifest, points).size
    parts = read_chunks(chunks, job, size)
    if with_rows:
        write_columns(folder / "rows", parts, source.columns, wanted)
    if counted is not None:
        write_columns(folder / counted, parts, counts.TYPES, wanted)
    remove_chunks(chunks)


def _remove_stale(folder: Path, wanted: Mapping[str, Any], chunks: Path) -> None:
    """Removes what was made of rows that are built again, but for the chunks of this build."""
    for old in folder.glob(".*-*"):  # of a process that ended: there is no other one now
        shutil.rmtree(old, ignore_errors=True)
    for other in folder.glob("[!.]*-*"):  # plans, counts, chunks
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
