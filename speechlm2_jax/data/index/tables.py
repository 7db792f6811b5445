"""Rows of Parquet files and of Hugging Face's Arrow files, by row group and place in it."""

from collections.abc import Iterator, Sequence

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.packed_rows import Members, PackedRow, PackedShard
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import conversation_of_row, conversations_of_rows
from speechlm2_jax.data.parquet import open_table, open_tables, table_columns


class TableRows:
    """Rows of tables; a shard is a row group of Parquet, or a batch of Arrow."""

    def __init__(
        self, shards: Sequence[PackedShard], options: ManifestOptions, kind: RowKind
    ) -> None:
        assert kind.table is not None
        self.shards, self.options, self._columns = shards, options, kind.table

    def rows(self, number: int) -> Iterator[PackedRow]:
        """Those of a group, in order."""
        shard = self.shards[number]
        rows = open_table(shard.manifest).rows(shard.group, self._columns)
        for place, made in enumerate(conversations_of_rows(rows, self.options)):
            yield PackedRow(place, made)

    def conversation(self, number: int, offset: int, members: Members) -> Conversation:
        """The row at a place of a group; its recording is where the table tells."""
        shard = self.shards[number]
        rows = open_table(shard.manifest).rows(shard.group, self._columns, offset)
        made = conversation_of_row(next(rows), self.options)
        assert made is not None
        return made


def table_shards(entry: InputConfig, options: ManifestOptions) -> tuple[PackedShard, ...]:
    """The groups of the tables of an entry. Raises SettingsError as `read_parquet`."""
    columns = table_columns(entry)
    return tuple(
        PackedShard(table.path, (), group, table.text_bytes(group, columns.audio))
        for table in open_tables(entry.manifests, options, columns)
        for group in range(len(table.groups))
    )
