"""Local copies of runs in object stores, for what reads their weights."""

import logging
import re
import shutil
from pathlib import Path
from typing import Literal

from speechlm2_jax.checkpointing import CHECKPOINTS, choose
from speechlm2_jax.exit_codes import MARKER
from speechlm2_jax.object_store.commits import FROZEN, Commit, read_commits, steps_of
from speechlm2_jax.object_store.downloads import DamagedObjectError, fetch_file, fetch_step
from speechlm2_jax.object_store.folders import copy_folder
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError, each
from speechlm2_jax.object_store.progress import shown_progress

log = logging.getLogger(__name__)
_STEP = re.compile(rf"(.+?)/(?:{CHECKPOINTS}/(\d+)|{CHECKPOINTS})/*")
_NEEDED = ("config.yaml", f"{CHECKPOINTS}/ranking.json")
_FOLDER = "model/"
_METRICS = "metrics.jsonl"


def fetch_run(address: str, which: Literal["best_else_last", "last"] = "best_else_last") -> Path:
    """Downloads one checkpoint of a run and what belongs to it. Returns the local folder.

    `address` is that of a run, of its checkpoints, or of one step of it; of a step, the folder of
    the step is returned. Files that are there already are kept. A damaged step is named in the log,
    and the next one is taken. Raises ObjectStoreError if there is no checkpoint.
    """
    run, step = run_and_step(address)
    store = ObjectStore(run)
    folder = copy_folder(store.address)
    sizes = store.sizes()
    commits = read_commits(store, sizes)
    small = [name for name in sizes if name in _NEEDED or name.startswith(_FOLDER)]
    each(lambda name: fetch_file(store, name, folder), small)
    _remove_uncommitted(folder, commits)
    steps = steps_of(commits) if step is None else [int(step)]
    while steps:
        paths = [folder / CHECKPOINTS / str(one) for one in steps]
        chosen = choose(paths, which) if step is None else paths[0]
        if chosen.name not in commits:
            break
        wanted = [commits[name] for name in (FROZEN, chosen.name) if name in commits]
        try:
            _fetch(store, wanted, folder)
        except DamagedObjectError as error:
            log.warning("%s; trying another step", error)
            steps.remove(int(chosen.name))
            continue
        except ObjectStoreError:
            if store.read(commits[chosen.name].object_name) is not None:
                raise
            return fetch_run(address, which)  # the run has just removed that step
        return folder if step is None else chosen
    what = "checkpoint of a run" if step is None else f"step {step}"
    kept = ", ".join(map(str, steps_of(commits))) or "none"
    raise ObjectStoreError(f"{address}: found no {what} (steps that are whole: {kept})")


def fetch_metrics(address: str) -> list[Path]:
    """Downloads metrics, settings and end of each run at or below an address.

    Returns their local folders. Raises ObjectStoreError if there is no run.
    """
    address = address.rstrip("/")
    names = ObjectStore(address).sizes()
    rows = [f"/{name}" for name in names if f"/{name}".endswith(f"/{_METRICS}")]
    if not rows:
        raise ObjectStoreError(f"{address}: no run there (a run directory has {_METRICS})")
    folders: list[Path] = []
    for run in (name.removesuffix(f"/{_METRICS}") for name in rows):
        store = ObjectStore(f"{address}{run}")
        folders.append(copy_folder(store.address))
        for name in (_METRICS, "config.yaml", MARKER):
            if f"{run}/{name}".lstrip("/") in names:
                fetch_file(store, name, folders[-1])
            else:  # of an earlier download
                (folders[-1] / name).unlink(missing_ok=True)
    return folders


def run_and_step(address: str) -> tuple[str, str | None]:
    """The address of a run, and the step if `address` names one of its steps."""
    named = _STEP.fullmatch(address)
    return (named[1], named[2]) if named else (address, None)


def _fetch(store: ObjectStore, commits: list[Commit], folder: Path) -> None:
    missing = [
        commit
        for commit in commits
        if not commit.is_in(folder / CHECKPOINTS / commit.name, reads_all=True)
    ]
    total = sum(commit.total_bytes for commit in missing)
    with shown_progress(f"downloading {store.address}", total) as progress:
        for commit in missing:
            fetch_step(store, commit, folder, progress)


def _remove_uncommitted(folder: Path, commits: dict[str, Commit]) -> None:
    """Removes steps of an earlier download that the run no longer has."""
    inside = folder / CHECKPOINTS
    for step in inside.iterdir() if inside.is_dir() else ():
        if step.name.isdigit() and step.name not in commits:
            shutil.rmtree(step, ignore_errors=True)
