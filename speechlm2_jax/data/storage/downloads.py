"""Manifests of other machines: local copies, kept until the original changes."""

import functools
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

import xxhash

from speechlm2_jax.data.storage.access import StorageAccess
from speechlm2_jax.data.storage.addresses import name_of
from speechlm2_jax.data.storage.errors import StorageError

_ADDRESS = "address"
_KEPT = 2
"""Copies of one file, of its last versions."""
_FRESH_S = 60.0
"""For so long the original is not asked for its version again."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_seen: dict[tuple[str, StorageAccess, Path], tuple[float, Path]] = {}


def cache_folder() -> Path:
    """Where copies lie."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "speechlm2_jax" / "downloads"


def folder_of(address: str) -> Path:
    """Where copies of a file lie, and what is computed from it."""
    return cache_folder() / xxhash.xxh3_64_hexdigest(address.encode())


def local_copy(address: str, storage: StorageAccess) -> Path:
    """The path of a copy of a remote file, which is read again if the original has changed.

    Where storage tells no version, each start reads it again. Raises StorageError.
    """
    address = storage.check(address)
    root = cache_folder()
    seen = _seen.get((address, storage, root))
    if seen is not None and time.monotonic() - seen[0] < _FRESH_S and seen[1].is_file():
        return seen[1]
    file = storage.open(address)
    state, folder = file.state(), folder_of(address)
    key = xxhash.xxh3_64_hexdigest(f"{state.size} {state.version}".encode())
    path = folder / key / (name_of(address) or "file")
    if not state.version or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / _ADDRESS).write_text(address, encoding="utf-8")
        _download(address, storage, path, state.size)
        _prune(folder)
    with _lock:
        _seen[address, storage, root] = (time.monotonic(), path)
    return path


def _download(address: str, storage: StorageAccess, path: Path, size: int | None) -> None:
    descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
    try:
        with open(descriptor, "wb") as file:
            for block in storage.open(address).stream(0):
                file.write(block)
            if size is not None and file.tell() != size:
                message = f"{address}: {file.tell()} bytes came, {size} were announced"
                raise StorageError(message, cause="incomplete")
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    _log.info("%s: copied to %s", address, path.parent)


def _prune(folder: Path) -> None:
    """Removes all but the last copies."""
    import shutil

    copies = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
    for old in copies[: max(len(copies) - _KEPT, 0)]:
        shutil.rmtree(old, ignore_errors=True)


@functools.lru_cache(maxsize=1 << 14)
def origin_of(path: Path) -> str | None:
    """The address that a path is a copy of; None for any other path."""
    if not str(path).startswith(str(cache_folder())):
        return None
    try:
        return (path.parent.parent / _ADDRESS).read_text(encoding="utf-8")
    except OSError:
        return None


def shown(path: Path) -> str:
    """A path for messages: the address of a copy."""
    return origin_of(path) or str(path)
