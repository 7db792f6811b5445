"""Brings local folders to what a store holds: to resume a run, or to read one of its steps."""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

from speechlm2_jax.checkpointing import CHECKPOINTS, DamagedError
from speechlm2_jax.checkpointing.checksums import CHECKSUMS, checksum_of_file, verify
from speechlm2_jax.object_store.commits import FROZEN, Commit, read_commits, steps_of
from speechlm2_jax.object_store.objects import ObjectStore, each
from speechlm2_jax.object_store.progress import Transfer, shown_progress
from speechlm2_jax.object_store.small_files import (
    LAST_WRITER,
    checkpoint_names,
    is_small_file,
    small_files,
)

log = logging.getLogger(__name__)
_ATTEMPTS = 3
"""How often a file is read whose contents are not those of its record."""
_TOKEN = f".{LAST_WRITER}"
_FETCHING = "fetching"
"""Folder beside a run directory for what is being downloaded."""


class DamagedObjectError(RuntimeError):
    """An object whose contents are not those that its record tells."""


def prepare(store: ObjectStore, folder: Path) -> dict[str, Commit]:
    """Makes a local run directory what the store holds. Returns the whole checkpoints there.

    Called by one process, which holds the lock of the store. If this folder was the last to write
    there, what it holds beyond that stays, to be uploaded. If another one was, steps and files that
    the store lacks are removed here. Checkpoints that were not uploaded whole are removed there.
    Raises ObjectStoreError.
    """
    sizes = store.sizes()
    commits = _whole(store, sizes)
    _remove_partial(store, sizes, commits)
    is_last_writer = _is_last_writer(store, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_last_writer:
        _remove_others(store.address, folder, sizes, commits)
    newest = [str(step) for step in steps_of(commits)[:1]]
    wanted = [
        commit
        for name, commit in commits.items()
        if not commit.is_in(_place(folder, name), reads_all=name in (*newest, FROZEN))
        and not (is_last_writer and _is_intact_other(_place(folder, name), commit))
    ]
    here = small_files(folder)
    small = {
        name: size
        for name, size in sizes.items()
        if is_small_file(name) and (name not in here or not is_last_writer)
    }
    total = sum(commit.total_bytes for commit in wanted) + sum(small.values())
    with shown_progress(f"downloading {store.address}", total) as progress:
        _fetch_small(store, small, folder, progress)
        for commit in wanted:
            try:
                fetch_step(store, commit, folder, progress)
            except DamagedObjectError as error:
                log.warning("%s; this checkpoint is passed over", error)
                del commits[commit.name]
    _become_last_writer(store, folder)
    return commits


def fetch_step(store: ObjectStore, commit: Commit, folder: Path, progress: Transfer) -> None:
    """Downloads a step, or the frozen parameters, and compares them with their record.

    The folder of the step appears whole. Raises DamagedObjectError, ObjectStoreError.
    """
    place = _place(folder, commit.name)
    draft = folder.parent / _FETCHING / f"{commit.name}.{uuid.uuid4().hex}"
    try:
        for below in commit.files:
            (draft / below).parent.mkdir(parents=True, exist_ok=True)
        each(lambda below: _fetch_file(store, commit, below, draft / below, progress), commit.files)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not commit.is_in(place, reads_all=True):  # another reader may have been quicker
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fetch_file(store: ObjectStore, name: str, target: Path) -> None:
    """Downloads one small file, which appears whole. Raises ObjectStoreError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.draft")
    try:
        store.download(name, draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _fetch_file(
    store: ObjectStore, commit: Commit, below: str, target: Path, progress: Transfer
) -> None:
    wanted, name = commit.files[below], commit.file_name(below)
    for _ in range(_ATTEMPTS):
        store.download(name, target)
        if checksum_of_file(target) == wanted.checksum:
            progress.add(wanted.size)
            return
    raise DamagedObjectError(f"{store.address}/{name} has changed since it was written")


def _fetch_small(
    store: ObjectStore, sizes: Mapping[str, int], folder: Path, progress: Transfer
) -> None:
    def fetch(name: str) -> None:
        fetch_file(store, name, folder / name)
        progress.add(sizes[name])

    each(fetch, sizes)


def _whole(store: ObjectStore, sizes: Mapping[str, int]) -> dict[str, Commit]:
    """The checkpoints that have a record and all of its files."""
    commits = read_commits(store, sizes)
    for name, commit in list(commits.items()):
        if missing := commit.missing(sizes):
            log.warning("%s/%s is missing or cut short; its step is lost", store.address, missing)
            del commits[name]
    return commits


def _remove_partial(
    store: ObjectStore, sizes: Mapping[str, int], commits: Mapping[str, Commit]
) -> None:
    """Removes what an upload that was broken off has left."""
    for name in sorted(checkpoint_names(sizes) - commits.keys()):
        what = "the frozen parameters were" if name == FROZEN else f"step {name} was"
        log.warning("%s: %s not uploaded whole and is removed", store.address, what)
        start = f"{CHECKPOINTS}/{name}/"
        store.remove([f"committed/{name}"])
        store.remove(one for one in sizes if one.startswith(start))


def _is_last_writer(store: ObjectStore, folder: Path) -> bool:
    """Whether no other folder has written to the store since this one."""
    token = store.read(LAST_WRITER)
    try:
        return token is not None and (folder / _TOKEN).read_bytes() == token
    except OSError:
        return False


def _is_intact_other(place: Path, commit: Commit) -> bool:
    """Whether a local checkpoint is undamaged, and not the recorded one: it was written again."""
    recorded = commit.files.get(CHECKSUMS)
    try:
        is_other = recorded and checksum_of_file(place / CHECKSUMS) != recorded.checksum
        return bool(is_other) and verify(place) is not None
    except (OSError, DamagedError):
        return False


def _become_last_writer(store: ObjectStore, folder: Path) -> None:
    token = uuid.uuid4().hex.encode()
    store.write(LAST_WRITER, token)
    (folder / _TOKEN).write_bytes(token)


def _remove_others(
    address: str, folder: Path, sizes: Mapping[str, int], commits: Mapping[str, Commit]
) -> None:
    """Removes local files and steps that the store lacks, as another folder has written there."""
    for name in small_files(folder).keys() - sizes.keys():
        (folder / name).unlink(missing_ok=True)
    inside = folder / CHECKPOINTS
    for step in sorted(inside.iterdir()) if inside.is_dir() else ():
        if (step.name.isdigit() or step.name == FROZEN) and step.name not in commits:
            log.warning(
                "%s: step %s of %s is removed; another folder has written to the store since, and "
                "the store does not hold it",
                *(address, step.name, folder),
            )
            shutil.rmtree(step, ignore_errors=True)


def _place(folder: Path, name: str) -> Path:
    return folder / CHECKPOINTS / name
