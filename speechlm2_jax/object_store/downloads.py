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
from speechlm2_jax.object_store.commits import (
    COMMITTED,
    FROZEN,
    Commit,
    is_checkpoint,
    read_commits,
    steps_of,
)
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError, each, path_below
from speechlm2_jax.object_store.progress import Transfer, shown_progress
from speechlm2_jax.object_store.small_files import (
    LAST_WRITER,
    TOKEN,
    checkpoint_names,
    is_small_file,
    local_token,
    small_files,
)

log = logging.getLogger(__name__)
_ATTEMPTS = 3
"""How often a file is read whose contents are not those of its record."""
_FETCHING = "fetching"
"""Folder beside a run directory for what is being downloaded."""
_SET_ASIDE = "set_aside"
"""Folder beside a run directory for files that may be the only copy."""


class DamagedObjectError(RuntimeError):
    """An object whose contents are not those that its record tells."""


def prepare(store: ObjectStore, folder: Path) -> dict[str, Commit]:
    """Makes a local run directory what the store holds. Returns the whole checkpoints there.

    Called by one process, which holds the lock of the store. If no other folder has written there
    since this one, what it holds beyond that stays, to be uploaded. If another one has, steps and
    files that the store lacks are removed here; they are set aside if that is not known, as this
    folder has no token. Checkpoints whose upload was broken off are removed there. Those whose
    record is damaged, or whose files are, stay there and are not used. Raises ObjectStoreError.
    """
    sizes = store.sizes()
    recorded = read_commits(store, sizes)
    commits = _whole(store.address, recorded, sizes)
    _remove_partial(store, sizes)
    token, own = store.read(LAST_WRITER), local_token(folder)
    is_last_writer = own is not None and token in (own, None)
    folder.mkdir(parents=True, exist_ok=True)
    if token not in (own, None):
        _remove_others(store.address, folder, sizes, commits, recorded)
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
        targets = {below: path_below(draft, below) for below in commit.files}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        each(lambda below: _fetch_file(store, commit, below, targets[below], progress), targets)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not commit.is_in(place, reads_all=True):  # another reader may have been quicker
            shutil.rmtree(place, ignore_errors=True)
            draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fetch_file(store: ObjectStore, name: str, folder: Path) -> None:
    """Downloads one small file of a run directory, which appears whole. Raises ObjectStoreError."""
    target = path_below(folder, name)
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
        fetch_file(store, name, folder)
        progress.add(sizes[name])

    each(fetch, sizes)


def _whole(
    address: str, recorded: Mapping[str, Commit], sizes: Mapping[str, int]
) -> dict[str, Commit]:
    """The checkpoints all of whose recorded files are there."""
    commits = dict(recorded)
    for name, commit in recorded.items():
        if missing := commit.missing(sizes):
            log.warning(
                "%s/%s is missing or cut short; its checkpoint is left there and not used",
                *(address, missing),
            )
            del commits[name]
    return commits


def _remove_partial(store: ObjectStore, sizes: Mapping[str, int]) -> None:
    """Removes what an upload that was broken off has left: it has no record.

    Raises ObjectStoreError if no folder has uploaded anything there.
    """
    partial = [name for name in checkpoint_names(sizes) if f"{COMMITTED}/{name}" not in sizes]
    if partial and LAST_WRITER not in sizes:
        raise ObjectStoreError(
            f"{store.address}/{CHECKPOINTS}/{min(partial)} was not uploaded by a run there; copy "
            "these checkpoints to a local folder for exp_manager.resume_from_checkpoint, and choose"
            " another address, or delete them"
        )
    for name in sorted(partial):
        what = "the frozen parameters were" if name == FROZEN else f"step {name} was"
        log.warning("%s: %s not uploaded whole and is removed", store.address, what)
        start = f"{CHECKPOINTS}/{name}/"
        store.remove(one for one in sizes if one.startswith(start))


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
    (folder / TOKEN).write_bytes(token)


def _remove_others(
    address: str,
    folder: Path,
    sizes: Mapping[str, int],
    commits: Mapping[str, Commit],
    recorded: Mapping[str, Commit],
) -> None:
    """Removes local files and steps that the store lacks, as another folder has written there.

    Sets them aside if this folder has lost its token, so that it may have been the last one. A
    step stays if it is the one that the store has a record of, but not all files.
    """
    is_overtaken = local_token(folder) is not None
    aside = folder.parent / _SET_ASIDE / uuid.uuid4().hex
    for name in small_files(folder).keys() - sizes.keys():
        _remove(folder / name, None if is_overtaken else aside / name)
    for step in sorted((folder / CHECKPOINTS).glob("*")):
        name = step.name
        is_intact = name in recorded and recorded[name].is_in(step, reads_all=True)
        if not is_checkpoint(name) or name in commits or is_intact:
            continue
        if is_overtaken:
            fate, reason = "removed", "another folder has written to the store since"
        else:
            fate, reason = f"moved to {aside}", f"{TOKEN} is missing there"
        log.warning(
            "%s: step %s of %s is %s; %s, and the store does not hold it",
            *(address, name, folder, fate, reason),
        )
        _remove(step, None if is_overtaken else aside / CHECKPOINTS / name)


def _remove(path: Path, aside: Path | None) -> None:
    """Deletes a file or folder, or moves it to `aside`."""
    if aside is not None:
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _place(folder: Path, name: str) -> Path:
    return folder / CHECKPOINTS / name
