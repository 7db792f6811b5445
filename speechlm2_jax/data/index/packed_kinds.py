"""What reads the rows of shards, by their kind."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from speechlm2_jax.data.index.one_manifest import OneManifestRows
from speechlm2_jax.data.index.packed_rows import (
    DialogRows,
    PackedShard,
    RowsOfTars,
    SharRows,
    TarredRows,
)
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.index.tables import TableRows
from speechlm2_jax.data.index.webdataset_rows import WebDatasetRows
from speechlm2_jax.data.manifest_options import ManifestOptions

NEMO_TARRED, ONE_MANIFEST = "nemo_tarred", "nemo_tarred_by_shard"
SHAR, DUPLEX_SHAR = "shar", "duplex_shar"
DIALOGS_TARRED, SHARE_GPT_TARRED = "dialogs_tarred", "share_gpt_tarred"
PARQUET, WEBDATASET = "parquet", "share_gpt_webdataset"
SHARD_TYPES = (PARQUET, WEBDATASET)
"""Types whose examples are in shards that are no manifests."""
_KINDS: Mapping[str, Callable[[Sequence[PackedShard], ManifestOptions, RowKind], RowsOfTars]] = {
    NEMO_TARRED: TarredRows,
    SHAR: SharRows,
    DUPLEX_SHAR: SharRows,
    DIALOGS_TARRED: DialogRows,
    SHARE_GPT_TARRED: DialogRows,
    PARQUET: TableRows,
    WEBDATASET: WebDatasetRows,
}


def rows_of_shards(
    shards: Sequence[PackedShard],
    options: ManifestOptions,
    kind: RowKind,
    points: Path | None = None,
) -> RowsOfTars:
    """What reads shards of a kind.

    Args:
        shards: what is read.
        options: how rows become conversations.
        kind: of the rows.
        points: of one compressed manifest the folder of points that reading starts from.
    """
    if kind.name == ONE_MANIFEST:
        return OneManifestRows(shards, options, kind, points)
    return _KINDS[kind.name](shards, options, kind)
