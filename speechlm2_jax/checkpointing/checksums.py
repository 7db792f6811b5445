"""Checksums of a folder: written into it before it appears, compared before anything is read.

`checksums.xxh3` has one line per file, as `xxhsum -H2` prints and checks them:

    <xxh3_128>  params/d/1ba7d4a31f99a408
    # <name> <value>                        notes: what the folder goes with
    # checksums <xxh3_128>                  of the lines above

Every other file of the folder is listed. A missing, changed or additional file is damage. The
folder's `_CHECKPOINT_METADATA` (listed too) tells that it has checksums, so a removed list is
damage too; only a folder without that mark counts as one of an older version.
"""

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from speechlm2_jax.settings import parse_json

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.xxh3"
METADATA = "_CHECKPOINT_METADATA"
MARK = {"checksums": "xxh3_128"}
"""What the metadata of a folder with checksums holds."""
UNCHECKED = b"unchecked"
"""What people write instead of a list, for a folder that they have changed."""
_LEFT_BY_FILE_SYSTEMS = (".nfs", "._", ".DS_Store", ".fuse_hidden")
"""Beginnings of names that no reader opens and that systems put anywhere: never damage."""
_CHUNK_BYTES = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)
_LONGEST_MESSAGE_BYTES = 1024


class DamagedError(RuntimeError):
    """A checkpoint or a part of one that cannot be used; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """The contents of the checksums.xxh3 of a folder."""

    files: Mapping[str, str]
    """Checksum by path below the folder, `/` between its parts."""
    notes: Mapping[str, str]


def write_checksums(folder: Path, notes: Mapping[str, str]) -> None:
    """Reads every file of a folder and writes their checksums beside them, at once."""
    names = _files(folder)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: checksum_of_file(folder / name), names)
        lines = [f"{checksum}  {name}\n" for checksum, name in zip(found, names, strict=True)]
    lines += [f"# {name} {value}\n" for name, value in notes.items()]
    text = "".join(lines)
    draft = folder / f"._{CHECKSUMS}"  # a name without a checksum
    draft.write_text(f"{text}# checksums {xxhash.xxh3_128_hexdigest(text.encode())}\n")
    draft.replace(folder / CHECKSUMS)


def read_checksums(folder: Path) -> Checksums | None:
    """The checksums of a folder as they were written; None if it is of an older version.

    Raises DamagedError if they are missing or not as they were written.
    """
    path = folder / CHECKSUMS
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        if is_marked(folder) is False:
            return None
        raise DamagedError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from error
    body, mark, seal = text.rpartition("# checksums ")
    if not mark or seal != f"{xxhash.xxh3_128_hexdigest(body.encode())}\n":
        raise DamagedError(f"{path} has changed since it was written")
    files, notes = {}, {}
    for line in body.splitlines():
        if line.startswith("# "):
            name, _, value = line[2:].partition(" ")
            notes[name] = value
        else:
            checksum, _, name = line.partition("  ")
            files[name] = checksum
    return Checksums(files=files, notes=notes)


def verify(folder: Path, below: str = "") -> Checksums | None:
    """Compares every file of a folder, or those `below` one inside it, with their checksums.

    Returns the checksums, None for a folder of an older version. Raises DamagedError naming a file
    that has changed, is missing, or does not belong there.
    """
    checksums = read_checksums(folder)
    if checksums is not None:
        _check_names(folder, checksums, below)
        names = [name for name in checksums.files if name.startswith(below)]
        _check_files(folder, checksums, names)
    return checksums


def verify_listed(folder: Path, remedy: str, *, is_expected: bool) -> None:
    """`verify` for a folder beside the checkpoints, which people edit; errors end in `remedy`.

    `is_expected`: a missing list is damage. The word `unchecked` in its place is not.
    """
    listed = folder / CHECKSUMS
    try:
        if listed.exists() and listed.read_bytes().strip() == UNCHECKED:
            return
        if listed.exists() or (is_expected and folder.is_dir()):
            verify(folder)
    except OSError as error:
        raise DamagedError(f"{listed} cannot be read ({error}); {remedy}") from error
    except DamagedError as error:
        raise DamagedError(f"{error}; {remedy}") from error


def verify_together(folder: Path) -> Checksums | None:
    """`verify` by all processes of a run, each reading its share; all raise if one finds damage.

    Every process must call it.
    """
    import jax  # 0.6 s; commands that only look for checkpoints do without

    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return verify(folder)
    checksums, problem = None, ""
    try:
        checksums = read_checksums(folder)
        if checksums is not None:
            _check_names(folder, checksums, "")
            _check_files(folder, checksums, sorted(checksums.files)[index::count])
    except DamagedError as error:
        problem = str(error)
    found = _first_message(problem)
    if found:
        raise DamagedError(found)
    return checksums


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, the same text once in a process."""
    log.warning("%s", text)


def warn_of_an_older_version(step: Path) -> None:
    """Tells, once per run, that damage of a checkpoint would not be seen."""
    warn_once(
        f"{step.parent}: checkpoints of an older version have no checksums, so damaged files in "
        "them would not be noticed; the next ones have"
    )


def checksum_of_file(path: Path) -> str:
    """The xxh3_128 of a file's bytes, in hex. Raises OSError if it cannot be read."""
    checksum = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(path.stat().st_size, 1))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.hexdigest()


def is_marked(folder: Path) -> bool | None:
    """Whether the metadata of a folder tells of checksums; None if it cannot be read."""
    try:
        return bool(parse_json((folder / METADATA).read_bytes()).get("custom_metadata"))
    except (OSError, ValueError, AttributeError):
        return None


def _files(folder: Path) -> list[str]:
    """Every file below a folder that has a checksum, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for root, _, names in os.walk(folder)
        for path in (Path(root, name) for name in names)
        if not path.name.startswith(_LEFT_BY_FILE_SYSTEMS) and path != folder / CHECKSUMS
    )


def _check_names(folder: Path, checksums: Checksums, below: str) -> None:
    there = {name for name in _files(folder) if name.startswith(below)}
    wanted = {name for name in checksums.files if name.startswith(below)}
    for name in sorted(wanted - there):
        raise DamagedError(f"{folder / name} is missing")
    for name in sorted(there - wanted):
        raise DamagedError(f"{folder / name} does not belong to the checkpoint")


def _check_files(folder: Path, checksums: Checksums, names: Iterable[str]) -> None:
    def problem(name: str) -> str | None:
        path = folder / name
        try:
            is_same = checksum_of_file(path) == checksums.files[name]
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return None if is_same else f"{path} has changed since it was written"

    with ThreadPoolExecutor(_THREADS) as threads:
        for found in threads.map(problem, names):
            if found is not None:
                raise DamagedError(found)


def _first_message(own: str) -> str:
    """The first of all processes' messages that is not empty. Every process must call it."""
    from jax.experimental import multihost_utils

    encoded = own.encode()[:_LONGEST_MESSAGE_BYTES]
    padded = np.zeros(_LONGEST_MESSAGE_BYTES, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(padded)):
        if row.any():
            return bytes(row).rstrip(b"\0").decode(errors="replace")
    return ""
