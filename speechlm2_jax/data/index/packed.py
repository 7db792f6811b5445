"""The rows of shards with packed recordings, by their common index."""

import functools
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.entry_readers import placeholders_of
from speechlm2_jax.data.index.folders import digest, state_of_file
from speechlm2_jax.data.index.mapped_rows import MappedRows
from speechlm2_jax.data.index.opening import IndexSource, open_index
from speechlm2_jax.data.index.packed_rows import (
    DIALOGS_TARRED,
    KINDS,
    NEMO_TARRED,
    SHAR,
    SHARE_GPT_TARRED,
    PackedShard,
    RowsOfTars,
    member_at,
)
from speechlm2_jax.data.index.row_columns import (
    PACKED_TYPES,
    SEVERAL_MEMBER_TYPES,
    SEVERAL_TYPES,
    SHARD_TYPES,
)
from speechlm2_jax.data.index.row_kinds import SHARE_GPT, RowKind
from speechlm2_jax.data.index.worker import PromptSettings
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.paths import expand_shards, local_files, packed_file
from speechlm2_jax.data.shar import RECORDING, shar_shards
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.tarred import tars_of_manifests
from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class PackedIndex(MappedRows):
    """The rows of shards: columns in mapped memory, and each row as a conversation."""

    rows: RowsOfTars
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

    def conversation(self, row: int) -> Conversation:
        """The conversation of a row, read from its manifest and the header of its recording."""
        number = int(np.searchsorted(self.shard_ends, row, side="right"))
        tar, offset = self.rows.shards[number].tar, int(self.columns["offset"][row])
        try:
            members = [member_at(tar, block) for block in self._blocks(row)]
        except tarfile.TarError as error:
            raise SettingsError(f"{tar}: {error}") from error
        return self.rows.conversation(number, offset, [one for one in members if one is not None])

    def _blocks(self, row: int) -> list[int]:
        """Where the recordings of a row begin."""
        if self.columns["clips"][row] < 2:
            return [int(self.columns["member"][row])]
        begin, end = np.searchsorted(self.columns["several"], [row, row + 1])
        return self.columns["several_member"][begin:end].tolist()


def open_packed(
    entry: InputConfig, options: ManifestOptions, prompts: PromptSettings
) -> list[PackedIndex] | None:
    """Opens the indexes of the shards of an entry, which are built first if need be.

    None for what is no list of shards with recordings alone: one manifest of several tars, SHAR
    with more fields, and remote tars. Raises SettingsError.
    """
    found = _shards_of(entry)
    if found is None or any(is_remote(shard.tar) for _, shards in found for shard in shards):
        return None
    return [_open(kind, shards, options, prompts) for kind, shards in found]


def _open(
    kind: RowKind,
    shards: tuple[PackedShard, ...],
    options: ManifestOptions,
    prompts: PromptSettings,
) -> PackedIndex:
    source = IndexSource(
        manifest=shards[0].manifest,
        options=options,
        kind=kind,
        state=partial(_state, shards),
        columns=(*PACKED_TYPES, *SEVERAL_TYPES, *SEVERAL_MEMBER_TYPES, *SHARD_TYPES),
        shards=shards,
    )
    opened = open_index(source, prompts)
    return PackedIndex(
        rows=KINDS[kind.name](shards, options, kind),
        columns=opened.columns,
        has_order=kind.name == SHAR,
        identity=opened.identity,
        folders=opened.folders,
    )


def _shards_of(entry: InputConfig) -> list[tuple[RowKind, tuple[PackedShard, ...]]] | None:
    """The sets of an entry's shards, in the order in which they are read, each with its kind."""
    if entry.shar_path is not None:
        shards = list(shar_shards(entry.shar_path, (RECORDING,)))
        if any(shard.values for shard in shards):
            return None
        pairs = [PackedShard(one.cuts, str(one.tars[0].path or "")) for one in shards]
        return [(RowKind(name=SHAR), tuple(pairs))]
    sets: list[tuple[RowKind, tuple[PackedShard, ...]]] = []
    for manifests, tars in entry.tarred:
        paths, listed = local_files(expand_shards(manifests)), expand_shards(tars)
        kind = _tarred_kind(entry, paths)
        if kind is None:
            return None
        if kind.name == NEMO_TARRED:
            pairs = tars_of_manifests(paths, listed)
        else:
            pairs = list(zip(paths, listed, strict=True)) if len(paths) == len(listed) else None
        if pairs is None:
            return None
        sets.append((kind, tuple(PackedShard(path, packed_file(tar)) for path, tar in pairs)))
    return sets


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
    manifests = [os.stat(shard.manifest) for shard in shards]
    tars = [os.stat(shard.tar) for shard in shards if shard.tar]
    stamps = [[one.st_size, one.st_mtime_ns] for one in (*manifests, *tars)]
    names = [[str(shard.manifest), shard.tar] for shard in shards]
    return {
        "bytes": sum(one.st_size + 1 for one in manifests),
        "shards": len(shards),
        "stamps": digest([names, stamps]),
        "sample": state_of_file(shards[0].manifest)["sample"],
    }
