"""Where the bytes of a recording are: a file of its own, or a stretch of one."""

import io
from typing import NamedTuple

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.audio_files import open_binary
from speechlm2_jax.data.storage.access import StorageAccess
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.data.tar_headers import BLOCK_BYTES, OCTAL_BYTES, size_in_header


class NamedBytes(io.BytesIO):
    """Bytes that errors can name."""

    def __init__(self, data: bytes, *, name: str) -> None:
        super().__init__(data)
        self._name = name

    def __str__(self) -> str:
        return self._name


class ParquetCell(NamedTuple):
    """A value in a Parquet file."""

    row_group: int
    row: int
    """Of the row group, from 0."""
    column: str


class AudioLocation(NamedTuple):
    """A recording in storage."""

    path: str
    byte_range: tuple[int, int] | None = None
    """First byte and size of it inside `path`, a tar; None: the whole file."""
    cell: ParquetCell | None = None
    """Of a recording that is a value in `path`, a Parquet file."""
    storage: StorageAccess = StorageAccess()
    """How it is read."""

    def source(self, name: str) -> str | NamedBytes:
        """What `open_audio` takes; `name` is what errors call a recording inside a file.

        Raises AudioError for a file that is missing or cannot be read.
        """
        if self.cell is not None:
            from speechlm2_jax.data.parquet import cell_bytes

            return NamedBytes(cell_bytes(self.path, self.cell), name=f"{name} in {self.path}")
        if is_remote(self.path):
            return NamedBytes(self._remote_bytes(), name=self._shown(name))
        if self.byte_range is None:
            return self.path
        head = self._header_bytes
        start, size = self.byte_range
        with open_binary(self.path) as file:
            file.seek(start - head)
            return NamedBytes(self._checked(file.read(head + size)), name=self._shown(name))

    def named(self, data: bytes, name: str) -> NamedBytes:
        """Its bytes, if these have been read already."""
        return NamedBytes(data, name=self._shown(name))

    def _shown(self, name: str) -> str:
        return self.path if self.byte_range is None else f"{name} in {self.path}"

    def _remote_bytes(self) -> bytes:
        try:
            if self.byte_range is None:
                return self.storage.whole(self.path)
            start, size = self.byte_range
            head = self._header_bytes
            data = self.storage.member(self.path, start - head, head + size)
        except StorageError as error:
            raise AudioError(str(error), cause=error.cause, path=self.path) from error
        if len(data) < head + size:
            raise AudioError(f"{self.path}: ends inside a member", cause="truncated")
        return self._checked(data)

    @property
    def _header_bytes(self) -> int:
        """How much is read before a member of a tar, to see that it is still there."""
        assert self.byte_range is not None
        start, size = self.byte_range
        is_member = self.path.endswith(".tar") and start >= BLOCK_BYTES and size < OCTAL_BYTES
        return BLOCK_BYTES if is_member else 0

    def _checked(self, data: bytes) -> bytes:
        """What comes behind the header. Raises AudioError for a header of another member."""
        assert self.byte_range is not None
        head = self._header_bytes
        if head and size_in_header(data[:head]) != self.byte_range[1]:
            message = f"{self.path}: changed since its members were listed"
            raise AudioError(message, cause="changed", path=self.path)
        return data[head:] if head else data
