"""What may be read, and how long it may take."""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from speechlm2_jax.data.storage import versions
from speechlm2_jax.data.storage.addresses import (
    FILE,
    HTTP,
    SCHEMES,
    is_below,
    is_remote,
    normalised,
    scheme_of,
)
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.data.storage.filesystems import FileState, StoreFile, check_package, names_in
from speechlm2_jax.settings import SettingsError


class RemoteFile(Protocol):
    """A file that is read through a library (`HttpFile`, `StoreFile`)."""

    def state(self) -> FileState:
        """Size and version. Raises StorageError."""
        ...

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from `start` on, fewer at the end of the file. Raises StorageError."""
        ...

    def stream(self, start: int) -> Iterator[bytes]:
        """Yields the file from `start` to its end. Raises StorageError."""
        ...


@dataclass(frozen=True, kw_only=True)
class StorageAccess:
    """Files and addresses that may be read. Raises SettingsError for an unknown scheme."""

    roots: tuple[str, ...] | None = None
    """Folders and prefixes of addresses (`allowed_roots`); None: everything."""
    schemes: tuple[str, ...] | None = None
    """Schemes, `file` for paths (`allowed_schemes`); None: all."""
    limit_s: float | None = None
    """How long a read may take (`read_timeout`)."""

    def __post_init__(self) -> None:
        for scheme in self.schemes or ():
            if scheme not in SCHEMES:
                raise SettingsError(
                    f"allowed_schemes: {scheme!r} is not one of {', '.join(SCHEMES)}"
                )
        for root in self.roots or ():
            if is_remote(root):
                normalised(root)

    def check(self, path: str) -> str:
        """An address in one spelling, or a path as it is.

        Links are followed and `..` resolved before the comparison. Raises StorageError for what
        `allowed_roots` and `allowed_schemes` leave out.
        """
        own = normalised(path) if is_remote(path) else path
        if self.schemes is not None and scheme_of(own) not in self.schemes:
            raise StorageError(
                f"{path}: {scheme_of(own)} is not one of allowed_schemes "
                f"({', '.join(self.schemes)})",
                cause="not_allowed",
            )
        if self.roots is not None and not any(_is_in(own, root) for root in self.roots):
            raise StorageError(f"{path}: lies in none of allowed_roots", cause="not_allowed")
        if scheme_of(own) != FILE:
            check_package(own)
        return own

    def open(self, address: str) -> RemoteFile:
        """A remote file, which is not opened yet. Raises StorageError if it may not be read."""
        address = self.check(address)
        if scheme_of(address) not in HTTP:
            return StoreFile(address, self.limit_s)
        from speechlm2_jax.data.storage.http import HttpFile

        return HttpFile(address, self.check, self.limit_s)

    def read(self, path: str, start: int, size: int) -> bytes:
        """A stretch of a file, local or remote; fewer bytes at its end.

        Raises StorageError, and OSError for a local file that cannot be read.
        """
        if is_remote(path):
            return self.open(path).read(start, size)
        with open(self.check(path), "rb") as file:
            file.seek(start)
            return file.read(size)

    def member(self, address: str, start: int, size: int) -> bytes:
        """A stretch of a remote tar whose members were listed.

        From time to time its version is asked for. Raises StorageError, `changed` for a tar that
        was replaced meanwhile.
        """
        file, own = self.open(address), self.check(address)
        if versions.is_due(own):
            versions.keep_or_check(own, file.state().version)
        return file.read(start, size)

    def whole(self, address: str) -> bytes:
        """A remote file. Raises StorageError."""
        return b"".join(self.open(address).stream(0))

    def names(self, folder: str) -> list[str]:
        """The names of the files in a remote folder, sorted. Raises StorageError."""
        folder = self.check(folder)
        if scheme_of(folder) in HTTP:
            raise SettingsError(
                f"{folder}: a web server does not list its files; name each (SHAR: shar_path with "
                "the files of each field)"
            )
        return names_in(folder, self.limit_s)


def _is_in(path: str, root: str) -> bool:
    if is_remote(path) != is_remote(root):
        return False
    if is_remote(root):
        return is_below(path, normalised(root))
    real, folder = os.path.realpath(path), os.path.realpath(os.path.expanduser(root))
    return real == folder or real.startswith(folder.rstrip(os.sep) + os.sep)


_CURRENT: ContextVar[StorageAccess | None] = ContextVar("storage", default=None)


def current() -> StorageAccess:
    """What may be read while manifests are being read; what is made of them keeps it."""
    return _CURRENT.get() or StorageAccess()


@contextlib.contextmanager
def using(storage: StorageAccess) -> Iterator[None]:
    """Makes `storage` the current one of this thread."""
    token = _CURRENT.set(storage)
    try:
        yield
    finally:
        _CURRENT.reset(token)


__all__ = ["FILE", "RemoteFile", "StorageAccess", "current", "using"]
