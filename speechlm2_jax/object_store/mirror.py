"""Uploads a run directory to its store, in the background, while the run writes it."""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from speechlm2_jax.checkpointing import CHECKPOINTS, DamagedError, step_folders
from speechlm2_jax.checkpointing.checksums import CHECKSUMS, checksum_of_file
from speechlm2_jax.exit_codes import MARKER
from speechlm2_jax.object_store.commits import FROZEN, Commit, steps_of
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError, each
from speechlm2_jax.object_store.progress import Transfer, amount, shown_progress
from speechlm2_jax.object_store.small_files import Stamp, is_small_file, local_token, small_files

log = logging.getLogger(__name__)
LOOK_S = 1.0
"""Seconds between two looks for new checkpoints."""
SMALL_FILES_S = 30.0
"""Seconds between two uploads of logs and metrics; more where these take long."""
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 300.0
"""Pause after a failed upload; it doubles with every further one."""
_LAST_RETRY_AT_END_S = 20.0
PATIENCE_S = 600.0
"""At the end of a run: how long to wait for an upload that transfers nothing."""
_SPARE = 2
"""A checkpoint that the run has deleted stays until so many newer ones are uploaded."""
_SHARE = 0.1
"""Largest part of the time that is spent on the small files."""
_UPLOADING = "uploading"
"""Folder beside a run directory with links to the files that are being uploaded."""
_SMALL_BYTES = 1 << 26
_DELETED_WITHIN_S, _POLL_S = 10.0, 0.1


class Mirror:
    """Keeps a store equal to a local run directory.

    Args:
        store: where to.
        folder: the local run directory.
        commits: the whole checkpoints that the store holds.
        check: called before the store is changed; raises if another process trains there.
    """

    def __init__(
        self,
        store: ObjectStore,
        folder: Path,
        commits: Mapping[str, Commit],
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._store, self._folder, self._check = store, folder, check
        self._token = local_token(folder)
        self.commits = dict(commits)
        self.problem = ""
        """Why the last upload failed; empty if it did not."""
        self._sent: dict[str, Stamp] = {}
        self._stored = {name for name in store.sizes() if is_small_file(name)}
        self._small_files_at = 0.0
        self._progress = Transfer()
        self._damaged: set[str] = set()
        self._ends, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="object store", daemon=True)

    def start(self) -> None:
        """Starts to upload."""
        self._thread.start()

    def end(self) -> None:
        """Asks for everything that is left, at once. `wait` tells when it is there."""
        self._ends.set()

    def wait(self, seconds: float) -> bool:
        """Whether everything was uploaded, within so many seconds. Call `end` before."""
        return self._is_over.wait(seconds)

    @property
    def idle_s(self) -> float:
        """Seconds since something was uploaded last."""
        return time.monotonic() - self._progress.changed_s

    @property
    def last_step(self) -> int | None:
        """The newest step that the store holds whole."""
        return next(iter(steps_of(self.commits)), None)

    @property
    def sent(self) -> int:
        """Bytes that were uploaded so far."""
        return self._progress.done

    def left(self) -> int:
        """Bytes of local files that the store does not hold yet."""
        count = 0
        with contextlib.suppress(OSError):
            here = small_files(self._folder).items()
            count = sum(stamp[0] for name, stamp in here if self._is_new(name, stamp))
        for name in self._waiting():
            with contextlib.suppress(OSError):  # the run may have just deleted it
                files = (self._folder / CHECKPOINTS / name).rglob("*")
                count += sum(path.stat().st_size for path in files if path.is_file())
        return count

    def push(self) -> None:
        """Uploads everything that the store lacks, and removes there what the run has deleted.

        Raises ObjectStoreError, also if another process trains there or the local folder is gone.
        """
        self._check()
        while waiting := self._waiting():
            if not self._push_step(waiting[0]):
                break
        self._push_small_files()
        self._remove_deleted()

    def _has_folder(self) -> bool:
        """Whether the local folder is the one that this process opened, by its token."""
        return self._token is not None and local_token(self._folder) == self._token

    def _require_folder(self) -> None:
        """Raises ObjectStoreError if files may be missing that the run has not deleted.

        Called after the folder was listed.
        """
        if not self._has_folder():
            raise ObjectStoreError(
                f"the local folder {self._folder} was deleted, emptied or unmounted; nothing is "
                f"removed from {self._store.address}"
            )

    def _remove(self, names: Iterable[str]) -> None:
        if names := list(names):
            self._check()
            self._store.remove(names)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            is_end = self._ends.is_set()
            try:
                self._look(is_end)
            except Exception as error:  # whatever it is, the training continues
                self._tell(error, pause_s)
                self._ends.wait(pause_s) if not is_end else time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_RETRY_AT_END_S if is_end else LAST_RETRY_S)
                continue
            if self.problem:
                log.info("uploading to %s works again", self._store.address)
            self.problem, pause_s = "", FIRST_RETRY_S
            if is_end:
                self._is_over.set()
                return
            self._ends.wait(LOOK_S)

    def _look(self, is_end: bool) -> None:
        if is_end or time.monotonic() >= self._small_files_at or self._waiting():
            begin = time.monotonic()
            self.push()
            took_s = time.monotonic() - begin
            self._small_files_at = time.monotonic() + max(SMALL_FILES_S, took_s / _SHARE)

    def _tell(self, error: Exception, pause_s: float) -> None:
        is_known = isinstance(error, ObjectStoreError)
        self.problem = str(error) if is_known else f"{type(error).__name__}: {error}"
        log.warning(
            "cannot upload to %s (%s); trying again in %.0f s, and the run continues",
            *(self._store.address, " ".join(self.problem.split()), pause_s),
        )

    # ------------------------------------------------------------------ checkpoints

    def _waiting(self) -> list[str]:
        """Local checkpoints that the store lacks: frozen, then the newest first."""
        inside = self._folder / CHECKPOINTS
        frozen = [inside / FROZEN] if (inside / FROZEN).is_dir() else []
        own = [step for step in step_folders(self._folder) if step.parent.name == CHECKPOINTS]
        return [
            path.name
            for path in (*frozen, *own)
            if path.name not in self._damaged and not self._is_committed(path)
        ]

    def _is_committed(self, path: Path) -> bool:
        """Whether the store holds this very checkpoint: a run may write a step again."""
        commit = self.commits.get(path.name)
        if commit is None:
            return False
        wanted = commit.files.get(CHECKSUMS)
        found = _checksum(path / CHECKSUMS)  # None: it is just being deleted
        return wanted is None or found in (None, wanted.checksum)

    def _push_step(self, name: str) -> bool:
        """Uploads one checkpoint, its record last. Returns False if it is just being deleted."""
        source = self._folder / CHECKPOINTS / name
        pinned = self._folder.parent / _UPLOADING / name
        try:
            _link(source, pinned)
            commit = Commit.of(name, pinned)
        except (FileNotFoundError, DamagedError) as error:
            if _vanishes(source, _DELETED_WITHIN_S):
                return False
            log.warning("%s is not uploaded: %s", source, error)
            self._damaged.add(name)
            return True
        try:
            if self._has_folder():
                self._push_small_files()  # the rows of its steps belong to a checkpoint
            self._upload(commit, pinned)
        finally:
            shutil.rmtree(pinned, ignore_errors=True)
        return True

    def _upload(self, commit: Commit, folder: Path) -> None:
        store, name = self._store, commit.name
        what = "the frozen parameters" if name == FROZEN else f"step {name}"
        self._check()
        there = store.sizes(f"{CHECKPOINTS}/{name}")
        if there or name in self.commits:
            self._remove([commit.object_name])
            self.commits.pop(name, None)
            self._remove(there.keys() - {commit.file_name(below) for below in commit.files})

        def send(below: str) -> None:
            self._check()  # uploads are long, and another owner may write the same step
            store.upload(commit.file_name(below), folder / below, self._progress.add)

        begin, before = time.monotonic(), self._progress.done
        each(send, commit.files)
        if missing := commit.missing(store.sizes(f"{CHECKPOINTS}/{name}")):
            raise ObjectStoreError(f"{store.address}/{missing} is not there as it was uploaded")
        self._check()
        store.write(commit.object_name, commit.to_bytes())
        self.commits[name] = commit
        sent = amount(self._progress.done - before)
        took_s = time.monotonic() - begin
        log.info("uploaded %s to %s (%s in %.1f s)", what, store.address, sent, took_s)

    def _remove_deleted(self) -> None:
        """Removes the checkpoints that the run has deleted, records first, but never all."""
        inside = self._folder / CHECKPOINTS
        if not inside.is_dir():  # a run deletes steps, but never all
            return
        steps = steps_of(self.commits)
        spared = steps[:_SPARE] if self._waiting() else []
        deleted = [step for step in steps if not (inside / str(step)).is_dir()]
        if len(deleted) == len(steps):
            deleted = deleted[1:]
        self._require_folder()
        for name in (str(step) for step in deleted if step not in spared):
            self._remove([self.commits[name].object_name])
            del self.commits[name]
            self._remove(self._store.sizes(f"{CHECKPOINTS}/{name}"))

    # ------------------------------------------------------------------ small files

    def _is_new(self, name: str, stamp: Stamp) -> bool:
        return self._sent.get(name) != stamp

    def _push_small_files(self) -> None:
        """Uploads the files that have changed, and removes those that are gone.

        That a run is finished is told last, when all checkpoints are there.
        """
        here = small_files(self._folder)
        self._require_folder()
        gone = self._stored - here.keys()
        self._remove(gone)
        self._stored -= gone
        changed = {name: stamp for name, stamp in here.items() if self._is_new(name, stamp)}
        marker = changed.pop(MARKER, None)
        each(lambda item: self._send_small(*item), changed.items())
        if marker is not None and not self._waiting():
            self._send_small(MARKER, marker)

    def _send_small(self, name: str, stamp: Stamp) -> None:
        path = self._folder / name
        try:
            if stamp[0] < _SMALL_BYTES:  # as it is now, while the run appends to it
                self._store.write(name, path.read_bytes())
            else:
                self._store.upload(name, path)
        except FileNotFoundError:  # renamed or removed just now
            return
        self._sent[name] = stamp
        self._stored.add(name)
        self._progress.add(stamp[0])


def wait_with_progress(mirror: Mirror, address: str, turn: Callable[[bool], bool]) -> bool:
    """Waits until everything is uploaded. Returns False if nothing was for `PATIENCE_S` seconds.

    `turn` is called every second with whether this is over, and returns that for all processes.
    """
    before, left, begin = mirror.sent, mirror.left(), time.monotonic()
    mirror.end()
    with shown_progress(f"uploading the rest to {address}", left) as progress:
        while True:
            progress.done = mirror.sent - before
            is_over = mirror.wait(LOOK_S)
            idle_s = min(mirror.idle_s, time.monotonic() - begin)
            is_hopeless = not is_over and idle_s > PATIENCE_S
            if turn(is_over or is_hopeless):
                return is_over


def _checksum(path: Path) -> str | None:
    try:
        return checksum_of_file(path)
    except OSError:
        return None


def _vanishes(folder: Path, seconds: float) -> bool:
    """Whether a folder, which is perhaps being deleted, is gone within so many seconds."""
    deadline = time.monotonic() + seconds
    while folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _link(source: Path, target: Path) -> None:
    """Makes a folder of hard links to the files of another, which may then be deleted.

    Copies where the file system has no links.
    """
    shutil.rmtree(target, ignore_errors=True)

    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copy2(one, other)
        return other

    try:
        shutil.copytree(source, target, copy_function=link)
    except shutil.Error as error:  # of several files
        raise FileNotFoundError(str(source)) from error
