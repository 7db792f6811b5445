"""One training per run directory: a lock file names the process that trains there.

A hard link creates the lock together with its contents, atomically. The owner renews its time stamp
during the run and removes it at the end. A killed run leaves its lock behind. The next start
detects that it is stale and replaces it.
"""

import atexit
import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from speechlm2_jax import processes
from speechlm2_jax.console import exit_now
from speechlm2_jax.object_store.small_files import LOCK
from speechlm2_jax.settings import SettingsError, parse_json

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Seconds between two renewals of the time stamp."""
SILENT_S = 120.0
"""A lock of another machine is stale if it was not renewed for this many seconds."""
UNREADABLE_S = 1.0
"""How long to wait for the contents of an unreadable lock: a process may still be writing them."""
_LONGEST_NAME = 200
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that a lock names."""

    token: str
    """A random id of this lock."""
    host: str
    machine: str
    """Boot id of the operating system, and the namespace of `pid`."""
    pid: int
    process_start: str
    """Start time of the process from the operating system; empty if it is unknown."""
    since: str
    """Local time at which the lock was taken."""

    @staticmethod
    def this_process() -> "Owner":
        """The owner that names this process."""
        return Owner(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or "",
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether the process is one of this machine, so that we can check if it is alive."""
        return self.host == socket.gethostname() and self.machine == _machine()

    def is_gone(self) -> bool:
        """Whether the process has ended. Only valid if `is_here`."""
        start = _process_start(self.pid)
        is_same = not start or not self.process_start or start == self.process_start
        return start is None or not is_same


class RunLock:
    """The lock of a run directory, held by the first process for all processes of the run."""

    def __init__(self, path: Path | None, token: str = ""):
        """`path` is None in all processes of the run but the first."""
        self.path, self._token, self._pid = path, token, os.getpid()
        self._is_training, self._is_over = False, threading.Event()
        if path is not None:
            atexit.register(self.release)
            threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    @property
    def is_held(self) -> bool:
        """False after its release."""
        return not self._is_over.is_set()

    @contextmanager
    def training(self) -> Generator[None]:
        """Holds the lock for one call of `fit`, and releases it afterwards.

        Raises SettingsError if another thread of this process trains in the directory.
        """
        if self._is_training:
            raise SettingsError(
                f"{self.path and self.path.parent}: this process already trains there"
            )
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
            self.release()

    def release(self) -> None:
        """Removes the lock if this process owns it."""
        if self._is_over.is_set() or os.getpid() != self._pid:
            return
        self._is_over.set()
        atexit.unregister(self.release)
        if self.path is not None:
            with _held_mutex:
                _held.pop(self.path, None)
            with contextlib.suppress(OSError):
                if _token_of(self.path) == self._token:
                    self.path.unlink()

    def _beat(self) -> None:
        """Renews the time stamp. Ends the process if another process has taken over the lock."""
        assert self.path is not None
        while not self._is_over.wait(HEARTBEAT_S):
            try:
                token = _token_of(self.path)
                if token == self._token:
                    os.utime(self.path)
            except OSError:  # the disk does not respond, or the folder was moved
                continue
            if token != self._token and not self._is_over.is_set():
                exit_now(
                    f"{self.path.parent}: another process has taken over this run directory after "
                    f"{SILENT_S:.0f} s of silence; this one ends and saves nothing"
                )


_held: dict[Path, RunLock] = {}
"""Locks of this process, by path."""
_held_mutex = threading.RLock()


def acquire(run_dir: Path) -> RunLock:
    """Takes the lock of an existing run directory; every process of the run calls it.

    Raises SettingsError, on all of them, if another process trains there.
    """
    lock, problem = RunLock(None), ""
    if jax.process_index() == 0:
        try:
            lock = _acquire(run_dir.resolve() / LOCK)
        except SettingsError as error:
            problem = str(error)
    if problem := processes.broadcast_text(problem):
        raise SettingsError(problem)
    return lock


def _acquire(path: Path) -> RunLock:
    with _held_mutex:
        lock = _held.get(path)
        if lock is None or not lock.is_held:
            lock = _held[path] = RunLock(path, _take(path))
        return lock


def _take(path: Path) -> str:
    """Creates the lock file, or replaces a stale one. Returns the token of the new lock."""
    owner = Owner.this_process()
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise SettingsError(
            f"{path} is no regular file; delete it, or choose another run directory"
        )
    draft = path.with_name(f".{path.name}.{owner.token}")
    try:
        draft.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        deadline = time.monotonic() + UNREADABLE_S
        while not _created(draft, path):
            found = _read(path)
            if found is None:  # the owner has just released it
                continue
            other, changed_s = found
            if other is None and time.monotonic() < deadline:
                time.sleep(UNREADABLE_S / 10)
                continue
            # both stamps are the file system's, whose clock may differ from this machine's
            os.utime(draft)
            silent_s = draft.stat().st_mtime - changed_s
            reason = _why_stale(path, other, changed_s, silent_s)
            if reason is None and path.exists():
                raise in_use(path.parent, other)
            if reason is not None and _replaced(draft, path, other):
                name = "an unknown process" if other is None else str(other)
                log.warning("taking over %s: %s (%s)", path.parent, name, reason)
                break
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return owner.token


def _why_stale(path: Path, owner: Owner | None, changed_s: float, silent_s: float) -> str | None:
    """The reason why a lock is stale; None if its owner may still train.

    `silent_s` is the age of the time stamp. A time stamp in the future was made by another clock,
    or the clock was set back. Then this function waits to see whether the lock is renewed.
    """
    if owner is not None and owner.is_here:
        return "is gone" if owner.is_gone() else None
    if silent_s >= -SILENT_S:
        return f"has been silent for {silent_s:.0f} s" if silent_s > SILENT_S else None
    name = "an unknown process" if owner is None else str(owner)
    log.warning(
        "%s: the lock of %s has a time stamp %.0f s in the future; waiting up to %.0f s to see "
        "whether it is renewed",
        path.parent,
        name,
        -silent_s,
        SILENT_S,
    )
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_S / 10))
        found = _read(path)
        if found is None or found[1] != changed_s:
            return None
    return f"has not renewed its time stamp, {-silent_s:.0f} s in the future, for {SILENT_S:.0f} s"


def in_use(place: Path | str, owner: Owner | None) -> SettingsError:
    """The error of a run directory, or an address, in which another process trains."""
    who = "an unknown process" if owner is None else str(owner)
    return SettingsError(
        f"the run directory {place} is in use by another training: {who}. Wait for its end, stop "
        "it, or choose another exp_manager.explicit_log_dir"
    )


def guard_name(name: str, stale: Owner | None) -> str:
    """The name of the second lock that lets one process at a time replace a stale one."""
    return f"{name}.{'unreadable' if stale is None else stale.token}"[:_LONGEST_NAME]


def _created(draft: Path, path: Path) -> bool:
    """Creates the lock from the draft. Returns False if a lock exists already."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(draft.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _replaced(draft: Path, path: Path, stale: Owner | None) -> bool:
    """Replaces a stale lock by the draft. Returns False if another process was quicker.

    A second lock, whose name has the token of the stale one, lets only one process try at a time.
    """
    token = None if stale is None else stale.token
    guard = path.with_name(guard_name(path.name, stale))
    _take(guard)
    try:
        found = _read(path)
        if found is None or (None if found[0] is None else found[0].token) != token:
            return False
        os.utime(draft)  # taking the second lock may have taken long
        draft.replace(path)
        return True
    finally:
        guard.unlink()


def _read(path: Path) -> tuple[Owner | None, float] | None:
    """The owner (None if it cannot be read) and the time stamp; None if there is no lock."""
    try:
        changed_s = path.stat().st_mtime
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**parse_json(text))
        owner = owner if is_valid(owner) else None
    except (SettingsError, TypeError):
        owner = None
    return owner, changed_s


def is_valid(owner: Owner) -> bool:
    """Whether a lock's owner is one that `Owner.this_process` could have made."""
    is_pid = isinstance(owner.pid, int) and not isinstance(owner.pid, bool) and owner.pid > 0
    token = owner.token
    return is_pid and isinstance(token, str) and token.isascii() and token.isalnum()


def _token_of(path: Path) -> str | None:
    found = _read(path)
    if found is None:
        raise FileNotFoundError(path)
    return None if found[0] is None else found[0].token


def _machine() -> str:
    """Identifies this machine since its last boot: machines may have the same host name."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """Start time of a process of this machine; None if it has ended, empty if unknown."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:  # the process exists, but belongs to another user
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, IndexError):
        pass
    with contextlib.suppress(OSError):
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
