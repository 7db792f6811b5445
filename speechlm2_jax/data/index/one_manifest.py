"""Rows of NeMo's tarred data that has one manifest for several tars."""

import functools
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.index.packed_rows import PackedShard, TarredRows
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.index.rows import lines_of
from speechlm2_jax.data.index.texts import line_at, open_text, whole_lines
from speechlm2_jax.data.json_lines import object_of_line
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.storage.downloads import shown
from speechlm2_jax.data.tarred import check_numbers, numbered_tars, shard_of_row


class _Lines(NamedTuple):
    """The lines of a manifest, shard after shard, each in their order."""

    number: Int[np.ndarray, " n"]
    """From 1."""
    offset: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " shards"]
    """Where the lines of each shard end."""


class OneManifestRows(TarredRows):
    """Rows that tell their shard by `shard_id`.

    To read all of a shard, the manifest is gone through once to find the lines of each: 16 bytes a
    row in memory. One row is read from its place.

    Args:
        shards: one for each tar, by rising numbers.
        options: how rows become conversations.
        kind: of the rows.
        points: of a compressed manifest the folder of points that reading starts from.
    """

    def __init__(
        self,
        shards: Sequence[PackedShard],
        options: ManifestOptions,
        kind: RowKind,
        points: Path | None,
    ) -> None:
        super().__init__(shards, options, kind)
        self._text = open_text(shards[0].manifest, points)

    def _lines(self, number: int) -> Iterator[tuple[int, int, bytes]]:
        found = self._by_shard
        begin, end = int(found.ends[number - 1]) if number else 0, int(found.ends[number])
        stretch = slice(begin, end)
        for n, offset in zip(found.number[stretch], found.offset[stretch], strict=True):
            yield int(n), int(offset), line_at(self._text, int(offset))

    def _line_at(self, number: int, offset: int) -> bytes:
        return line_at(self._text, offset)

    @functools.cached_property
    def _by_shard(self) -> _Lines:
        """Finds the lines of each shard. Raises SettingsError for a row that names none."""
        manifest, line_number = self.shards[0].manifest, 0
        numbers, offsets, ids = array("q"), array("q"), array("q")
        for start, data in whole_lines(self._text):
            for offset, line in lines_of(data, start):
                line_number += 1
                if not line.removeprefix(b"\xef\xbb\xbf").strip():
                    continue
                where = f"{shown(manifest)} line {line_number}"
                ids.append(shard_of_row(where, object_of_line(where, line)))
                numbers.append(line_number)
                offsets.append(offset)
        tars = numbered_tars([shard.tar for shard in self.shards])
        check_numbers(tars, set(ids), manifest)
        order = np.argsort(np.asarray(ids, np.int64), kind="stable")
        rising = np.asarray(ids, np.int64)[order]
        return _Lines(
            number=np.asarray(numbers, np.int64)[order],
            offset=np.asarray(offsets, np.int64)[order],
            ends=np.searchsorted(rising, sorted(tars), side="right"),
        )
