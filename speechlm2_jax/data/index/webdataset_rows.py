"""Rows of tars in WebDataset's form, each found by the header of its first member."""

from collections import deque
from collections.abc import Iterator, Sequence

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.packed_rows import Members, PackedRow, PackedShard
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import NamedRow, conversation_of_row, conversations_of_rows
from speechlm2_jax.data.storage.access import current, using
from speechlm2_jax.data.webdataset import examples_of_tar, first_example, row_of_example


class WebDatasetRows:
    """Rows of tars; the offset of a row is that of the header of its first member."""

    def __init__(
        self, shards: Sequence[PackedShard], options: ManifestOptions, kind: RowKind
    ) -> None:
        self.shards, self.options, self._placeholders = shards, options, kind.placeholders
        self._storage = current()

    def rows(self, number: int) -> Iterator[PackedRow]:
        """Those of a tar, in order."""
        places: deque[int] = deque()

        def rows_of_tar() -> Iterator[NamedRow]:
            for example in examples_of_tar(self.shards[number].tar):
                places.append(example.place)
                yield row_of_example(example, self._placeholders)

        for made in conversations_of_rows(rows_of_tar(), self.options):
            yield PackedRow(places.popleft(), made)

    def conversation(self, number: int, offset: int, members: Members) -> Conversation:
        """The row at an offset, whose members follow there."""
        with using(self._storage):
            example = first_example(self.shards[number].tar, offset)
            made = conversation_of_row(row_of_example(example, self._placeholders), self.options)
        assert made is not None
        return made
