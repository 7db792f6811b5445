"""Files of stores that fsspec knows: S3, Google Cloud Storage, Azure, Hugging Face, memory."""

import errno
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from speechlm2_jax.data.storage import versions
from speechlm2_jax.data.storage.addresses import PACKAGES, scheme_of
from speechlm2_jax.data.storage.errors import StorageError, TemporaryError
from speechlm2_jax.data.storage.retries import Patience, in_time, persistently
from speechlm2_jax.settings import SettingsError

BLOCK_BYTES = 1 << 22
"""Of a file that is read from front to end."""
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
"""Names of what changes with a file, by the libraries."""
_NO_VERSIONS = frozenset(
    "name Key size Size type StorageClass islink destination mode uid gid nlink ino atime "
    "accessed last_accessed".split()
)
"""What else they tell of a file, which stays where it changes, or changes where it stays."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What storage tells of a file."""

    size: int | None
    version: str
    """Changes with the file; empty where that is not known."""


class StoreFile:
    """A file of a store.

    Args:
        address: its normalised address.
        limit_s: how long the whole of a read may take.
    """

    def __init__(self, address: str, limit_s: float | None) -> None:
        self._address, self._limit_s = address, limit_s
        self._files, self._path = _store(address)

    def state(self) -> FileState:
        """Size and version. Raises StorageError."""
        info: Any = self._call(lambda: self._files.info(self._path))
        return FileState(size=info.get("size"), version=version_of(info))

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from `start` on, fewer at the end of the file. Raises StorageError."""
        if not size:
            return b""
        data: Any = self._call(lambda: self._files.cat_file(self._path, start, start + size))
        return bytes(data)

    def stream(self, start: int) -> Iterator[bytes]:
        """Yields the file from `start` to its end; each block has the whole time limit."""
        state = self.state()
        versions.renew(self._address, state.version)
        total = state.size
        while total is None or start < total:
            block = self.read(start, BLOCK_BYTES)
            if not block:
                if total is not None:
                    message = f"{self._address}: ends at byte {start} of {total}"
                    raise StorageError(message, cause="incomplete")
                return
            yield block
            start += len(block)

    def _call(self, attempt: Callable[[], Result]) -> Result:
        patience = Patience(self._limit_s)
        return persistently(lambda: self._attempted(attempt, patience), patience)

    def _attempted(self, attempt: Callable[[], Result], patience: Patience) -> Result:
        if scheme_of(self._address) == "memory":
            return _translated(attempt, self._address)
        return _translated(lambda: in_time(attempt, patience.stall_s, self._address), self._address)


def version_of(info: Mapping[str, Any]) -> str:
    """What changes with a file, of all that its library tells; empty: nothing does."""
    found = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    if found:
        return found
    rest = {key: info[key] for key in sorted(info) if key not in _NO_VERSIONS}
    return repr(rest) if any(value is not None for value in rest.values()) else ""


def names_in(folder: str, limit_s: float | None) -> list[str]:
    """The names of the files in a folder of a store, sorted. Raises StorageError."""
    files, path = _store(folder)
    patience = Patience(limit_s)

    def attempt() -> Any:
        return in_time(lambda: files.ls(path, detail=False), patience.stall_s, folder)

    found: Any = persistently(lambda: _translated(attempt, folder), patience)
    return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)


def check_package(address: str) -> None:
    """Raises SettingsError if the package that an address needs is not installed."""
    package = PACKAGES.get(scheme_of(address))
    if package is not None and not _is_installed(package):
        raise SettingsError(
            f"{address}: needs the package {package}; python -m pip install {package}"
        )


_is_installed = functools.cache(lambda package: importlib.util.find_spec(package) is not None)


def _store(address: str) -> tuple[Any, str]:
    """The library of an address, and its path there."""
    check_package(address)
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(address)
    except Exception as error:  # of credentials and settings, of many kinds
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"{address}: {reason}", cause="unreachable") from error
    return files, str(path)


def _translated(attempt: Callable[[], Result], address: str) -> Result:
    """The result; raises what libraries raise as StorageError, or TemporaryError."""
    try:
        return attempt()
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{address}: no such file", cause="missing") from error
    except PermissionError as error:
        raise StorageError(f"{address}: not allowed to read it", cause="forbidden") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise StorageError(f"{address}: not a file", cause="missing") from error
    except Exception as error:  # libraries raise kinds of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        is_late = isinstance(error, TimeoutError) or getattr(error, "errno", 0) == errno.ETIMEDOUT
        cause = "timed_out" if is_late else "unreachable"
        raise TemporaryError(f"{address}: {reason}", cause=cause) from error
