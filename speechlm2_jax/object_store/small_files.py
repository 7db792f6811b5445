"""The files of a run directory beside its checkpoints: logs, metrics, settings, the model's."""

import os
from collections.abc import Iterable
from pathlib import Path

from speechlm2_jax.checkpointing import CHECKPOINTS
from speechlm2_jax.object_store.commits import COMMITTED, is_checkpoint

LAST_WRITER = "last_writer"
TOKEN = f".{LAST_WRITER}"
"""File of a local run directory with the contents of `LAST_WRITER` that this folder wrote."""
LOCK = "run.lock"
"""The process that trains in a run directory, or at an address."""
_OWN = (COMMITTED, LAST_WRITER)
"""First parts of names that belong to the store alone."""
Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns."""


def is_small_file(name: str) -> bool:
    """Whether a name below a run directory is one of them: neither a lock, a draft nor a step's."""
    parts = name.split("/")
    if any(part.startswith(".") or part.endswith(".draft") for part in parts):
        return False
    if parts[0] in _OWN or parts[0].startswith(LOCK):
        return False
    return parts[0] != CHECKPOINTS or len(parts) == 2


def small_files(folder: Path) -> dict[str, Stamp]:
    """The small files of a local run directory, by name; none if it is not there.

    Raises OSError if it, or a folder in it, cannot be listed.
    """
    found: dict[str, Stamp] = {}
    for root, inside, names in os.walk(folder, onerror=_raise_unless_gone):
        if Path(root) == folder / CHECKPOINTS:
            inside.clear()
        for path in (Path(root, name) for name in names):
            name = path.relative_to(folder).as_posix()
            if is_small_file(name):
                try:
                    state = path.stat()
                except FileNotFoundError:  # renamed or removed just now
                    continue
                found[name] = (state.st_size, state.st_mtime_ns)
    return found


def checkpoint_names(names: Iterable[str]) -> set[str]:
    """The steps, and `frozen`, that have files below checkpoints/ in a listing of a store."""
    parts = (name.split("/") for name in names if name.startswith(f"{CHECKPOINTS}/"))
    named = {one[1] for one in parts if len(one) > 2}
    return set(filter(is_checkpoint, named))


def local_token(folder: Path) -> bytes | None:
    """What a local run directory wrote as last writer; None if it is not there, or never did."""
    try:
        return (folder / TOKEN).read_bytes()
    except OSError:
        return None


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
