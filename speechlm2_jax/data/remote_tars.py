"""The members of remote tars: headers by ranges of bytes, kept on this machine."""

import json
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import xxhash

from speechlm2_jax.data.storage import versions
from speechlm2_jax.data.storage.access import RemoteFile, StorageAccess
from speechlm2_jax.data.storage.downloads import folder_of
from speechlm2_jax.data.tar_headers import TarMember, members_of
from speechlm2_jax.settings import SettingsError

_NEAR_BYTES, _MOST_BYTES = 1 << 16, 1 << 22
"""How much is read at once: doubled where headers lie close to each other."""
_NAME = "members.json"
_MAGIC_BYTES = 8

_log = logging.getLogger(__name__)


def remote_members(
    address: str, storage: StorageAccess, check: Callable[[bytes], None]
) -> list[TarMember]:
    """The files in a remote tar, in order, by its headers alone.

    They are read once, as long as storage tells that the tar is the same. `check` is given the
    first bytes. Raises SettingsError for a tar that is missing or damaged.
    """
    file = storage.open(address)
    state = file.state()
    versions.remember(storage.check(address), state.version)
    place = folder_of(address) / _NAME
    key = xxhash.xxh3_64_hexdigest(f"{state.size} {state.version}".encode())
    if state.version and (kept := _kept(place, key)) is not None:
        return kept
    try:
        blocks = TarBlocks(file, state.size)
        check(blocks.read(_MAGIC_BYTES, 0))
        members = list(members_of(blocks.read, state.size))
    except tarfile.TarError as error:
        raise SettingsError(
            f"{address}: not a tar archive, or damaged ({error}); copy or make it again"
        ) from error
    _keep(place, key, members)
    return members


class TarBlocks:
    """Reads a file block by block, each of which serves many small requests."""

    def __init__(self, file: RemoteFile, size: int | None) -> None:
        self._file, self._total = file, size
        self._start, self._data = 0, b""
        self._size = _NEAR_BYTES

    def read(self, size: int, place: int) -> bytes:
        """A stretch; fewer bytes at the end of the file."""
        end = self._start + len(self._data)
        if not self._start <= place <= place + size <= end:
            is_near = place <= end + self._size
            self._size = min(2 * self._size, _MOST_BYTES) if is_near else _NEAR_BYTES
            wanted = max(size, self._size)
            if self._total is not None:
                wanted = min(wanted, max(self._total - place, 0))
            self._start, self._data = place, self._file.read(place, wanted)
        offset = place - self._start
        return self._data[offset : offset + size]


def _kept(place: Path, key: str) -> list[TarMember] | None:
    """The members that were found before, of the same version of a tar."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return [TarMember(*row) for row in found["members"]] if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(place: Path, key: str, members: list[TarMember]) -> None:
    draft = place.with_suffix(f".{os.getpid()}.draft")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"key": key, "members": members}), encoding="utf-8")
        draft.replace(place)
    except (OSError, UnicodeEncodeError) as error:
        _log.warning("%s: the members of a tar cannot be kept (%s)", place, error)
