"""Is this the manifest that an index was made of? And where is its index?"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

SUFFIX = ".index"
SAMPLED_BLOCKS, BLOCK_BYTES = 32, 1 << 14

_log = logging.getLogger(__name__)


def state_of_file(path: Path) -> dict[str, Any]:
    """Size, time of the last change, and a checksum of sampled blocks of a file."""
    checksum = xxhash.xxh3_128()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        last = max(status.st_size - BLOCK_BYTES, 0)
        for number in range(SAMPLED_BLOCKS):
            file.seek(last * number // (SAMPLED_BLOCKS - 1))
            checksum.update(file.read(BLOCK_BYTES))
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sample": checksum.hexdigest(),
    }


def index_folders(manifest: Path) -> tuple[Path, ...]:
    """Where the index of a manifest may be: beside it, or in the user's cache folder."""
    manifest = manifest.resolve()
    name = f"{manifest.name}-{xxhash.xxh3_64_hexdigest(str(manifest).encode())}{SUFFIX}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    beside = manifest.with_name(manifest.name + SUFFIX)
    return beside, cache / "speechlm2_jax" / "index" / name


def writable(folders: tuple[Path, ...]) -> Path:
    """The first of several folders that can be written to; it is made if it is missing.

    Raises OSError if there is none.
    """
    for folder in folders[:-1]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folders[-1].mkdir(parents=True, exist_ok=True)
    return folders[-1]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time write into a folder."""
    import fcntl

    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("%s: another process writes to it; waiting ...", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the last one to finish wins
            pass
        yield


def prune(folder: Path, pattern: str, kept: int) -> None:
    """Removes all but the newest folders of a name."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    for old in found[: max(len(found) - kept, 0)]:
        shutil.rmtree(old, ignore_errors=True)


def digest(value: object) -> str:
    """A checksum of plain values, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
