"""Reads tars from front to end in a thread, ahead of what uses them, and on into the next one."""

import os
import queue
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from speechlm2_jax.data.remote_tars import TarBlocks
from speechlm2_jax.data.storage import versions
from speechlm2_jax.data.storage.access import StorageAccess
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.data.tar_headers import TarMember, end_of_member, members_of
from speechlm2_jax.data.tars import plain_name

BLOCK_BYTES = 1 << 18
AHEAD = 16
"""TarBlocks that wait, of each group and source."""
_LOOK_S = 0.2


def blocks_of(path: str, start: int, storage: StorageAccess) -> Iterator[bytes]:
    """Yields a file from a place to its end. Raises StorageError, and OSError for a local file."""
    if is_remote(path):
        file = storage.open(path)
        versions.follow(storage.check(path))
        yield from file.stream(start)
        return
    with open(storage.check(path), "rb", buffering=0) as file:
        if start:
            file.seek(start)
        while block := file.read(BLOCK_BYTES):
            yield block


@dataclass(frozen=True)
class _Begin:
    """The start of the file of a turn."""

    turn: int


@dataclass(frozen=True)
class _End:
    """The end of a file, or what ended it."""

    error: StorageError | OSError | None


class Feed:
    """The blocks of one file after another.

    Args:
        files: of each file the turn that it is read in, its path, and the place to start from.
        storage: how they are read.
    """

    def __init__(self, files: Iterator[tuple[int, str, int]], storage: StorageAccess) -> None:
        self._files, self._storage = files, storage
        self._queue: queue.Queue[bytes | _Begin | _End] = queue.Queue(AHEAD)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read_shards", daemon=True)
        self._thread.start()

    def file_of(self, turn: int) -> Iterator[bytes]:
        """The blocks of the file of a turn; all that is left of earlier ones is passed over.

        Raises StorageError, `timed_out` where nothing comes within the time limit, and OSError.
        """
        while self._get() != _Begin(turn):
            pass
        while not isinstance(found := self._get(), _End):
            assert isinstance(found, bytes)
            yield found
        if found.error is not None:
            raise found.error

    def close(self) -> None:
        """Stops reading; a read that hangs is left behind."""
        self._is_closed.set()

    def _get(self) -> bytes | _Begin | _End:
        limit_s = self._storage.limit_s
        try:
            # what reads has the limit for itself, with retries
            return self._queue.get(timeout=None if limit_s is None else 2 * limit_s)
        except queue.Empty:
            message = f"nothing came within {limit_s:g} s (read_timeout)"
            raise StorageError(message, cause="timed_out") from None

    def _run(self) -> None:
        for turn, path, start in self._files:
            if not self._put(_Begin(turn)):
                return
            error: StorageError | OSError | None = None
            try:
                for block in blocks_of(path, start, self._storage):
                    if not self._put(block):
                        return
            except (StorageError, OSError) as caught:
                error = caught
            if not self._put(_End(error)):
                return

    def _put(self, found: bytes | _Begin | _End) -> bool:
        """Whether it was taken, and reading goes on."""
        while not self._is_closed.is_set():
            try:
                self._queue.put(found, timeout=_LOOK_S)
            except queue.Full:
                continue
            return True
        return False


class Sequential:
    """Stretches of a file at rising places, from its blocks."""

    def __init__(self, blocks: Iterator[bytes], start: int) -> None:
        self._blocks, self._place, self._data = blocks, start, b""

    def read(self, size: int, place: int) -> bytes:
        """A stretch; fewer bytes at the end of the file.

        Raises what reading blocks raises, and tarfile.ReadError for a place far behind the end.
        """
        while self._place + len(self._data) < place:
            self._place += len(self._data)
            self._data = next(self._blocks, b"")
            if not self._data and place - self._place >= tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the file ends inside a member")
            if not self._data:
                return b""
        self._data, self._place = self._data[place - self._place :], place
        if len(self._data) < size:
            parts = [self._data]
            while sum(map(len, parts)) < size and (block := next(self._blocks, b"")):
                parts.append(block)
            self._data = b"".join(parts)
        return self._data[:size]

    def reaches(self, place: int) -> bool:
        """Whether the file has all bytes before a place; what lies before it is passed over."""
        while self._place + len(self._data) < place and (block := next(self._blocks, b"")):
            self._place, self._data = self._place + len(self._data), block
        return self._place + len(self._data) >= place


def members_before(tar: str, offset: int, storage: StorageAccess) -> Iterator[TarMember]:
    """The members of a tar before an offset, or all (below 0), by their headers alone.

    Raises StorageError, OSError and tarfile.ReadError where it cannot be read or is damaged.
    """
    if is_remote(tar):
        file = storage.open(tar)
        total = file.state().size
        yield from _before(members_of(TarBlocks(file, total).read, None), total, offset)
        return
    with open(storage.check(tar), "rb", buffering=0) as local:
        total = os.fstat(local.fileno()).st_size
        yield from _before(members_of(partial(os.pread, local.fileno()), None), total, offset)


def _before(members: Iterator[TarMember], total: int | None, offset: int) -> Iterator[TarMember]:
    place = 0
    for member in members:
        if 0 <= offset <= place:
            return
        if total is not None and member.start + member.size > total:
            raise tarfile.ReadError(f"the file ends inside {plain_name(member.name)!r}")
        yield member
        place = end_of_member(member)
