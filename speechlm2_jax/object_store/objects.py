"""Objects below one address of a store: read, written and listed through fsspec."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from speechlm2_jax.data.storage.addresses import HTTP, normalised, scheme_of
from speechlm2_jax.data.storage.filesystems import check_package
from speechlm2_jax.settings import SettingsError

PAUSES_S = (0.25, 1.0, 4.0, 15.0)
"""Pauses before a failed request is tried again."""
THREADS = 4
"""Files that are transferred at once."""
_READ_ONLY = (*HTTP, "hf")
_LONGEST_REASON = 300
Result = TypeVar("Result")


class ObjectStoreError(SettingsError):
    """A store that cannot be read or written; one line with the address and the reason."""


def path_below(folder: Path, name: str) -> Path:
    """The local path of an object whose name, or part of it, is below a folder.

    Whoever can write to a store chooses the names there. Raises ObjectStoreError for an absolute
    one, and for one with `..`, empty parts or backslashes.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(mark in name for mark in "\\\0"):
        raise ObjectStoreError(
            f"{name!r} cannot be the name of an object of a run: it may lead out of the local "
            "folder; delete the object, or do not use this address"
        )
    return folder / name


class ObjectStore:
    """The objects below one address; a name is relative to it, with `/` between its parts.

    Raises SettingsError for an address of another kind, and if its package is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = normalised(address).rstrip("/")
        scheme = scheme_of(self.address)
        if scheme in _READ_ONLY:
            raise SettingsError(f"{address}: a run directory cannot be at {scheme}://")
        check_package(self.address)
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(self.address)
        except Exception as error:  # of credentials and settings, of many kinds
            raise ObjectStoreError(f"{self.address}: {_reason(error)}") from error
        self._files, self._root = files, str(root).rstrip("/")

    def sizes(self, below: str = "") -> dict[str, int]:
        """The size in bytes of every object, or of those in a folder, by name."""
        path = self._path(below)

        def attempt() -> dict[str, Any]:
            self._files.invalidate_cache()  # other processes write too
            try:
                return self._files.find(path, detail=True)
            except FileNotFoundError:
                return {}

        start = f"{self._root.lstrip('/')}/"
        found = self._persistently(attempt).items()
        named = ((name.lstrip("/").removeprefix(start), info.get("size")) for name, info in found)
        return {name: int(size or 0) for name, size in named}

    def read(self, name: str) -> bytes | None:
        """The contents of an object; None if there is none."""

        def attempt() -> bytes | None:
            self._files.invalidate_cache()
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

        return self._persistently(attempt)

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces one small object."""
        self._persistently(lambda: self._files.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless one is there. Returns whether it did.

        Google Cloud Storage and S3 let one of several writers win. Elsewhere the last one may win
        where two begin within the same moment; each then finds out here who did.
        """
        if self.read(name) is not None:
            return False
        path = self._path(name)

        def attempt() -> None:
            try:
                self._files.pipe_file(path, data, mode="create")
            except TypeError:  # a library that does not know the mode
                self._files.pipe_file(path, data)

        try:
            attempt()
        except Exception:  # each library has a kind of its own for "is there already"
            if self.read(name) is None:
                self._persistently(attempt)
        return self.read(name) == data

    def upload(
        self, name: str, source: Path, on_bytes: Callable[[int], None] = lambda _: None
    ) -> None:
        """Writes or replaces an object with the contents of a file; `on_bytes` counts them."""
        from fsspec.callbacks import Callback

        class Counting(Callback):
            done = 0

            def relative_update(self, inc: int = 1) -> None:
                self.done += inc
                on_bytes(inc)

        def attempt() -> None:
            counting = Counting()
            self._files.put_file(str(source), self._path(name), callback=counting)
            on_bytes(source.stat().st_size - counting.done)  # not all libraries count

        self._persistently(attempt)

    def download(self, name: str, target: Path) -> None:
        """Writes the contents of an object to a file, whose folder exists."""
        self._persistently(lambda: self._files.get_file(self._path(name), str(target)))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""

        def remove(name: str) -> None:
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return

        each(lambda name: self._persistently(lambda: remove(name)), list(names))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _persistently(self, attempt: Callable[[], Result]) -> Result:
        """The result of the first attempt that succeeds. Raises ObjectStoreError of the last."""
        for pause_s in (*PAUSES_S, None):
            try:
                return attempt()
            except Exception as error:  # libraries raise kinds of their own
                if pause_s is None or isinstance(error, PermissionError | FileNotFoundError):
                    raise ObjectStoreError(f"{self.address}: {_reason(error)}") from error
            time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


def each(action: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Calls `action` with every item, several at once. Raises the first error; others are lost."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="object store") as threads:
        waiting = [threads.submit(action, item) for item in items]
        try:
            for one in waiting:
                one.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"not allowed ({' '.join(str(error).split())[:_LONGEST_REASON]})"
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
