"""Is a data set so large that its manifests get an index?"""

import gzip
import logging
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from speechlm2_jax.data.augmentation.variants import unindexed
from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.index.contents import IndexedRows
from speechlm2_jax.data.index.packed_kinds import PARQUET, WEBDATASET
from speechlm2_jax.data.index.row_kinds import TXT_PAIR
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.json_lines import is_gzip
from speechlm2_jax.data.manifest_watch import row_files
from speechlm2_jax.data.parquet import rows_of_tables
from speechlm2_jax.data.paths import expand_shards, local_file
from speechlm2_jax.data.sources import Source, read_sources
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.webdataset import examples_up_to, tars_of_folder
from speechlm2_jax.settings import SettingsError

LARGE_ROWS = 20_000
"""A data set of fewer rows is read into memory, and leaves no file behind."""
TOLD_ROWS = 100_000
"""Of an entry, so many rows in memory are told of."""
ROW_BYTES = 3000
"""Of a conversation with its prompt in memory: 0.3 GB for 100,000 rows, of usual texts."""
_BLOCK_BYTES = 1 << 22

_log = logging.getLogger(__name__)


def rows_up_to(path: Path, most: int) -> int:
    """Counts the lines of a file, but for a last one without an end, up to `most` or a few more."""
    rows = 0
    with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
        while rows < most and (block := file.read(_BLOCK_BYTES)):
            rows += max(block.count(b"\n"), block.count(b"\r"))
    return rows


def is_large(config: LoaderConfig, where: str) -> bool:
    """Whether the manifests of all entries together have LARGE_ROWS lines or more.

    Not so if augmentation makes another number of examples, which an index does not know.
    """
    rows = 0

    def count(entry: InputConfig, config: LoaderConfig) -> list[object]:
        nonlocal rows
        for count in _counts(entry):
            if rows >= LARGE_ROWS:
                break
            rows += count(LARGE_ROWS - rows)
        return []

    try:
        read_sources(config, where, count)
    except (SettingsError, OSError, EOFError, zlib.error, tarfile.TarError):
        return False  # told when the files are read
    if rows >= LARGE_ROWS and (names := unindexed(config)):
        _log.warning(
            "%s: all rows are read into memory, because %s changes how many examples they make",
            where,
            ", ".join(names),
        )
        return False
    return rows >= LARGE_ROWS


def _counts(entry: InputConfig) -> Iterator[Callable[[int], int]]:
    """What counts the rows of each file of an entry; nothing of what has no index."""
    if entry.type == PARQUET:
        for path in expand_shards(entry.manifests):
            yield partial(rows_of_tables, path)
    elif entry.type == WEBDATASET:
        tars = () if is_remote(entry.data_dir or "") else tars_of_folder(entry.data_dir or "")
        for tar in tars:
            yield partial(examples_up_to, tar)
    elif entry.type == TXT_PAIR:
        for path in expand_shards(entry.source_paths or ()):
            yield partial(rows_up_to, local_file(path))
    elif entry.line_files or entry.has_shards:
        for path in row_files(entry):
            yield partial(rows_up_to, local_file(path))


def tell_of_memory(where: str, sources: Sequence[Source[Any]]) -> None:
    """Logs which entries have many rows, and no index."""
    for source in sources:
        rows = len(source.conversations)
        if rows > TOLD_ROWS and not isinstance(source.conversations, IndexedRows):
            _log.warning(
                "%s: %s has no index: each process holds its %s rows in memory, about %.1f GB",
                *(where, source.name, f"{rows:,}", rows * ROW_BYTES / 1e9),
            )
