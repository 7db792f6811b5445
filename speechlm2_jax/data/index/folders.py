"""Is this the manifest that an index was made of? And where is its index?"""

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from speechlm2_jax.settings import SettingsError

SUFFIX = ".index"
SAMPLED_BLOCKS, BLOCK_BYTES = 32, 1 << 14
STALE_S, POLL_S = 60.0, 0.5
"""Where there are no locks: seconds after which a file that is not renewed has no writer, and
between two looks."""

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
    """Lets one process at a time write into a folder; the others wait, and say so.

    The lock of a process that ends, however it ends, is free.
    """
    import fcntl

    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell_of_waiting(folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            with _held(folder / "writer"):
                yield
            return
        yield


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """The same by a file, whose time its writer renews; one that stays as it is has no writer."""
    seen, since, is_told = 0, time.monotonic(), False
    while True:
        with suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        with suppress(FileNotFoundError):
            if (now := file.stat().st_mtime_ns) != seen:  # its host may have another clock
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STALE_S:
                _log.warning("%s: its writer has ended; going on", file.parent)
                file.unlink()
                continue
        if not is_told:
            _tell_of_waiting(file.parent)
        is_told = True
        time.sleep(POLL_S)
    is_done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(file, is_done), name="lock", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        is_done.set()
        renewer.join()
        file.unlink(missing_ok=True)


def _renew(file: Path, is_done: threading.Event) -> None:
    while not is_done.wait(STALE_S / 10):
        with suppress(OSError):
            os.utime(file)


def _tell_of_waiting(folder: Path) -> None:
    _log.info("%s: another process writes to it; waiting ...", folder)


@contextmanager
def told_of_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Raises SettingsError, in one line, where a disk has no room for what is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SettingsError(
            f"{folder}: no room for {what} ({os.strerror(error.errno)}); free some, and start again"
        ) from error


def prune(folder: Path, pattern: str, kept: int) -> None:
    """Removes all but the newest folders of a name."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    for old in found[: max(len(found) - kept, 0)]:
        shutil.rmtree(old, ignore_errors=True)


def digest(value: object) -> str:
    """A checksum of plain values, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
