"""Opens the indexes of one entry of `input_cfg`, by its type."""

from speechlm2_jax.data.cuts import warn_of_dialogs
from speechlm2_jax.data.duplex.forms import DuplexForm
from speechlm2_jax.data.index.contents import IndexedRows
from speechlm2_jax.data.index.counts import Counts
from speechlm2_jax.data.index.manifest import open_manifest
from speechlm2_jax.data.index.packed import open_packed
from speechlm2_jax.data.index.packed_kinds import SHARD_TYPES
from speechlm2_jax.data.index.pairs import open_pairs
from speechlm2_jax.data.index.row_kinds import CUTS, TXT_PAIR
from speechlm2_jax.data.index.rows import readers_of
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import ROWS_AT_ONCE


def open_rows(
    entry: InputConfig,
    options: ManifestOptions,
    counts: Counts,
    duplex: DuplexForm | None = None,
) -> IndexedRows | None:
    """The rows of an entry, read when they are asked for; None of what has no index.

    Builds the indexes where they are missing. Raises SettingsError.

    Args:
        entry: what is read.
        options: how its rows become conversations.
        counts: how their texts are counted.
        duplex: how they become conversations of two voices.
    """
    if entry.has_shards or entry.type in SHARD_TYPES:
        shards = open_packed(entry, options, counts, duplex)
        return None if shards is None else IndexedRows(manifests=tuple(shards))
    if entry.type == TXT_PAIR:
        pairs = open_pairs(entry, options, counts)
        return None if pairs is None else IndexedRows(manifests=tuple(pairs))
    readers = readers_of(entry, options, duplex)
    if readers is None:
        return None
    for reader in readers:
        if reader.kind.name == CUTS and options.roles is None:
            warn_of_dialogs(reader.manifest, ROWS_AT_ONCE)
    return IndexedRows(manifests=tuple(open_manifest(reader, counts) for reader in readers))
