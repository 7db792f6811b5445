"""The rows of shards with packed recordings, by their common index."""

import functools
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.duplex.forms import DuplexForm
from speechlm2_jax.data.entry_readers import placeholders_of
from speechlm2_jax.data.index.counts import Counts
from speechlm2_jax.data.index.folders import digest, state_of_file
from speechlm2_jax.data.index.mapped_rows import MappedRows
from speechlm2_jax.data.index.opening import IndexSource, open_index
from speechlm2_jax.data.index.packed_kinds import (
    DIALOGS_TARRED,
    DUPLEX_SHAR,
    NEMO_TARRED,
    ONE_MANIFEST,
    PARQUET,
    SHAR,
    SHARE_GPT_TARRED,
    WEBDATASET,
    rows_of_shards,
)
from speechlm2_jax.data.index.packed_rows import PackedShard, RowsOfTars, member_at, shard_bytes
from speechlm2_jax.data.index.row_columns import (
    AGENT_MEMBER,
    SEVERAL_MEMBER_TYPES,
    SEVERAL_TYPES,
    SHARD_TYPES,
    packed_types,
)
from speechlm2_jax.data.index.row_kinds import SHARE_GPT, RowKind
from speechlm2_jax.data.index.tables import table_shards
from speechlm2_jax.data.index.texts import can_index
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.json_lines import is_gzip, json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.parquet import table_columns
from speechlm2_jax.data.paths import expand_shards, local_files, packed_file
from speechlm2_jax.data.shar import RECORDING, shar_shards
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.tarred import numbered_tars, tars_of_manifests
from speechlm2_jax.data.webdataset import tars_of_folder
from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class PackedIndex(MappedRows):
    """The rows of shards: columns in mapped memory, and each row as a conversation."""

    rows: RowsOfTars
    kind: RowKind
    has_order: bool
    """Whether the order of shards is drawn anew for each pass, as that of SHAR is."""

    @property
    def options(self) -> ManifestOptions:
        """How rows become conversations."""
        return self.rows.options

    @functools.cached_property
    def shard_ends(self) -> Int[np.ndarray, " shards"]:
        """The row after the last one of each shard."""
        return np.cumsum(self.columns["shard_rows"], dtype=np.int64)

    def conversation(self, row: int) -> Any:
        """The conversation of a row, read from its manifest and the header of its recording."""
        number = int(np.searchsorted(self.shard_ends, row, side="right"))
        tars, offset = self.rows.shards[number].tars, int(self.columns["offset"][row])
        blocks = self._blocks(row)
        try:
            # of a table there is no tar
            both = zip(tars if len(tars) > 1 else tars * len(blocks), blocks, strict=bool(tars))
            members = [member_at(tar, block) for tar, block in both]
        except tarfile.TarError as error:
            raise SettingsError(f"{', '.join(tars)}: {error}") from error
        made = self.kind.finished(self.rows.conversation(number, offset, members))
        if made is None:
            raise SettingsError("is left out")
        return made

    def _blocks(self, row: int) -> list[int]:
        """Where the recordings of a row begin."""
        if self.columns["clips"][row] < 2:
            names = (name for name in ("member", AGENT_MEMBER) if name in self.columns)
            return [int(self.columns[name][row]) for name in names]
        begin, end = np.searchsorted(self.columns["several"], [row, row + 1])
        return self.columns["several_member"][begin:end].tolist()


def open_packed(
    entry: InputConfig,
    options: ManifestOptions,
    counts: Counts,
    duplex: DuplexForm | None = None,
) -> list[PackedIndex] | None:
    """Opens the indexes of the shards of an entry, which are built first if need be.

    None for what is no list of shards with recordings alone: SHAR with more fields, remote tars,
    and tables without rows. Raises SettingsError.

    Args:
        entry: what is read.
        options: how its rows become conversations.
        counts: how their texts are counted.
        duplex: how they become conversations of two voices.
    """
    found = _shards_of(entry, options, duplex)
    if found is None or not all(shards for _, shards in found):
        return None
    if any(is_remote(tar) for _, shards in found for shard in shards for tar in shard.tars):
        return None
    return [_open(replace(kind, duplex=duplex), own, options, counts) for kind, own in found]


def _open(
    kind: RowKind,
    shards: tuple[PackedShard, ...],
    options: ManifestOptions,
    counts: Counts,
) -> PackedIndex:
    source = IndexSource(
        manifest=shards[0].manifest,
        options=options,
        kind=kind,
        state=partial(_state, shards),
        columns=(
            *packed_types(len(shards[0].tars)),
            *SEVERAL_TYPES,
            *SEVERAL_MEMBER_TYPES,
            *SHARD_TYPES,
        ),
        is_compressed=kind.name == ONE_MANIFEST and is_gzip(shards[0].manifest),
        shards=shards,
    )
    opened = open_index(source, counts)
    return PackedIndex(
        rows=rows_of_shards(shards, options, kind, opened.points),
        kind=kind,
        columns=opened.columns,
        has_order=kind.name in (SHAR, DUPLEX_SHAR),
        identity=opened.identity,
        folders=opened.folders,
    )


def _shards_of(
    entry: InputConfig, options: ManifestOptions, duplex: DuplexForm | None
) -> list[tuple[RowKind, tuple[PackedShard, ...]]] | None:
    """The sets of an entry's shards, in the order in which they are read, each with its kind."""
    if entry.type == PARQUET:
        return [(RowKind(name=PARQUET, table=table_columns(entry)), table_shards(entry, options))]
    if entry.type == WEBDATASET:
        kind = RowKind(name=WEBDATASET, placeholders=placeholders_of(entry))
        tars = () if is_remote(entry.data_dir or "") else tars_of_folder(entry.data_dir or "")
        return [(kind, tuple(PackedShard(Path(tar), (tar,)) for tar in tars))] if tars else None
    if entry.shar_path is not None:
        shards = list(shar_shards(entry.shar_path, duplex.fields if duplex else (RECORDING,)))
        if any(shard.values for shard in shards):
            return None
        packed = [PackedShard(s.cuts, tuple(str(tar.path or "") for tar in s.tars)) for s in shards]
        return [(RowKind(name=DUPLEX_SHAR if duplex else SHAR), tuple(packed))]
    sets: list[tuple[RowKind, tuple[PackedShard, ...]]] = []
    for manifests, tars in entry.tarred:
        paths, listed = local_files(expand_shards(manifests)), expand_shards(tars)
        kind = _tarred_kind(entry, paths)
        if kind is None:
            return None
        if kind.name == NEMO_TARRED:
            kind, pairs = _pairs_of(kind, paths, listed)
        else:
            pairs = list(zip(paths, listed, strict=True)) if len(paths) == len(listed) else None
        if pairs is None:
            return None
        sets.append((kind, tuple(PackedShard(path, (packed_file(tar),)) for path, tar in pairs)))
    return sets


def _pairs_of(
    kind: RowKind, manifests: list[Path], tars: list[str]
) -> tuple[RowKind, list[tuple[Path, str]] | None]:
    """The manifest of each tar, which may be one of all; None for a text that has no index."""
    pairs = tars_of_manifests(manifests, tars)
    if pairs is not None:
        return kind, pairs
    by_number = numbered_tars(tars)
    pairs = [(manifests[0], by_number[number]) for number in sorted(by_number)]
    return replace(kind, name=ONE_MANIFEST), pairs if can_index(manifests[0]) else None


def _tarred_kind(entry: InputConfig, manifests: Sequence[Path]) -> RowKind | None:
    """What the rows of manifests with tars are, by the type or the first row."""
    if entry.type == SHARE_GPT:
        return RowKind(name=SHARE_GPT_TARRED, placeholders=placeholders_of(entry))
    first = next((row for path in manifests for _, row in json_lines(path)), {})
    if "conversations" in first:
        return RowKind(name=DIALOGS_TARRED)
    return RowKind(name=NEMO_TARRED) if "audio_filepath" in first else None


def _state(shards: Sequence[PackedShard]) -> dict[str, Any]:
    """Sizes and times of all files of shards, and a sample of the first manifest."""
    manifests = [os.stat(path) for path in dict.fromkeys(shard.manifest for shard in shards)]
    tars = [os.stat(tar) for shard in shards for tar in shard.tars if tar]
    stamps = [[one.st_size, one.st_mtime_ns] for one in (*manifests, *tars)]
    names = [[str(shard.manifest), *shard.tars] for shard in shards]
    return {
        "bytes": sum(shard_bytes(shards)),
        "shards": len(shards),
        "stamps": digest([names, stamps]),
        "sample": state_of_file(shards[0].manifest)["sample"],
    }
