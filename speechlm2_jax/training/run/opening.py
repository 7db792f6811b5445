"""Opens the run directory of a trainer: makes it, locks it, and keeps its object store up to date.

A run at an address works in a local folder of the user's cache, which the processes of the run
share. The first process holds the lock of the store, downloads what the store holds before the run
starts, and uploads while the run writes.
"""

import logging
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from speechlm2_jax import processes
from speechlm2_jax.checkpointing import CHECKPOINTS, step_folders
from speechlm2_jax.console import phase
from speechlm2_jax.exit_codes import MARKER
from speechlm2_jax.object_store import mirror as uploads
from speechlm2_jax.object_store.commits import Commit
from speechlm2_jax.object_store.copies import fetch_run, run_and_step
from speechlm2_jax.object_store.downloads import prepare
from speechlm2_jax.object_store.folders import (
    CACHE_VARIABLE,
    address_of,
    copy_folder,
    is_address,
    local_path,
)
from speechlm2_jax.object_store.mirror import Mirror
from speechlm2_jax.object_store.objects import ObjectStore
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run import directory, hosts, run_lock
from speechlm2_jax.training.run.disk_errors import DiskError
from speechlm2_jax.training.run.run_lock import RunLock
from speechlm2_jax.training.run.store_lock import lock_of

log = logging.getLogger(__name__)
_UNDER_WAY, _UPLOADED, _FAILED = 0, 1, 2
_AFTER_ERROR_S = 60.0
"""How long the end of a failed run waits for its upload."""


def other_run(name: str | None) -> Path | None:
    """The run, or the step, that `resume_from_checkpoint` names; all processes call this.

    Of an address its newest step is downloaded, the same on all processes. Raises SettingsError.
    """
    if not name:
        return None
    if not is_address(name):
        return local_path(name)
    run, _ = run_and_step(name)
    step = hosts.chosen_by_first(lambda: int(step_folders(fetch_run(name, "last"))[0].name))
    found: list[Path] = []
    hosts.together(lambda: found.append(fetch_run(f"{run}/{CHECKPOINTS}/{step}")))
    return found[0]


def finished_folder(run_dir: Path) -> Path | None:
    """Where a run that may be finished can be read; all processes call this.

    It is the run directory, or the local copy of one in a store. None if that has no `FINISHED`.
    """
    address = address_of(run_dir)
    if address is None:
        return run_dir

    def fetch() -> int | None:
        if ObjectStore(address).read(MARKER) is None:
            return None
        fetch_run(address, "last")
        return 1

    return None if hosts.chosen_by_first(fetch) is None else copy_folder(address)


class UploadError(DiskError):
    """The end of a run could not be uploaded."""


class OpenRun:
    """The run directory of a trainer, locked from `open` to the end of `training`.

    Args:
        folder: the run directory, or the local folder of one in an object store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, address_of(folder)
        self._lock: RunLock | None = None
        self._store: _OpenStore | None = None

    def open(self, check: Callable[[Path], object]) -> None:
        """Makes and locks the directory, which all processes must see; all of them call this.

        `check` raises SettingsError if the directory does not fit the settings. That is raised on
        all processes, also if another process trains there, or if its store cannot be reached.
        """
        folder = self.folder
        if self.address is None:
            hosts.of_first(lambda: check(folder))
        hosts.together(lambda: directory.create(folder))
        hosts.check_shared(folder, self._remedy)
        if self._lock is None or not self._lock.is_held:
            lock = run_lock.acquire(folder)
            try:
                hosts.of_first(self._open_store)
                hosts.together(lambda: check(folder))
            except BaseException:
                self.release()
                lock.release()
                raise
            self._lock = lock
        else:
            hosts.together(lambda: check(folder))

    @property
    def _remedy(self) -> str:
        if self.address is None:
            return "set exp_manager.explicit_log_dir to a folder"
        return f"a run at {self.address} works there; set {CACHE_VARIABLE} to a folder"

    def _open_store(self) -> None:
        if self.address is not None:
            self._store = _OpenStore.at(self.address, self.folder)

    @contextmanager
    def training(self) -> Generator[None]:
        """Holds the locks for one call of `fit`, and releases them afterwards."""
        assert self._lock is not None
        with self._lock.training():
            try:
                yield
            finally:
                self._release_store()

    @contextmanager
    def uploading(self) -> Generator[None]:
        """Uploads while open, and waits at the end until all is there; all processes call it.

        Raises UploadError, on all of them, if that fails.
        """
        if self.address is None:
            yield
            return
        mirror = None if self._store is None else self._store.mirror()
        try:
            yield
        except BaseException:
            if mirror is not None:
                mirror.end()
                with phase(f"uploading the rest to {self.address}"):
                    is_whole = mirror.wait(_AFTER_ERROR_S)
                if not is_whole:
                    log.error("%s", self._incomplete(mirror))
            raise
        self._finish(mirror)

    def _finish(self, mirror: Mirror | None) -> None:
        state = [_UNDER_WAY]

        def turn(is_over: bool) -> bool:
            own = _UNDER_WAY
            if is_over and mirror is not None:
                own = _UPLOADED if mirror.wait(0) else _FAILED
            state[0] = processes.largest(own)
            return state[0] != _UNDER_WAY

        if mirror is not None:
            uploads.wait_with_progress(mirror, str(self.address), turn)
        else:
            while not turn(False):
                pass
        if state[0] == _FAILED:
            raise UploadError(self._incomplete(mirror))
        log.info("the run is whole at %s", self.address)

    def _incomplete(self, mirror: Mirror | None) -> str:
        if mirror is None:
            return f"{self.address} does not hold the end of this run; process 0 tells why"
        step = "none" if mirror.last_step is None else f"step {mirror.last_step}"
        return (
            f"{self.address} does not hold the end of this run: {mirror.problem or 'too slow'}\n"
            f"  its last complete checkpoint: {step}\n"
            f"  the rest is in {self.folder} on {socket.gethostname()}; the same command there "
            "uploads it"
        )

    def release(self) -> None:
        """Releases the locks if they are held."""
        self._release_store()
        if self._lock is not None:
            self._lock.release()

    def _release_store(self) -> None:
        if self._store is not None:
            self._store.lock.release()
            self._store = None


class _OpenStore:
    """The store of a run, on the first process."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self._store, self._folder = store, folder
        self.lock = lock_of(store)
        try:
            with phase(f"reading {store.address}"):
                self._commits: dict[str, Commit] = prepare(store, folder)
        except BaseException:
            self.lock.release()
            raise

    @staticmethod
    def at(address: str, folder: Path) -> "_OpenStore":
        """Opens the store of an address. Raises SettingsError."""
        try:
            return _OpenStore(ObjectStore(address), folder)
        except OSError as error:
            raise SettingsError(f"{folder} cannot be written ({error.strerror})") from error

    def mirror(self) -> Mirror:
        """Starts to upload."""
        mirror = Mirror(self._store, self._folder, self._commits, self.lock.check)
        mirror.start()
        return mirror
