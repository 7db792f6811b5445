"""One training per address: a lock object names the process that trains there.

Stores have no clock that all processes share, and no change of an object that only one of several
writers can make. So the owner writes a growing number into the lock; whoever finds a lock of
another machine waits whether the number grows; and a stale lock is replaced by the process that
creates the object named after it, which only one can.
"""

import atexit
import contextlib
import json
import logging
import threading
import time
from dataclasses import asdict

from speechlm2_jax.console import exit_now
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError
from speechlm2_jax.object_store.small_files import LOCK
from speechlm2_jax.settings import SettingsError, parse_json
from speechlm2_jax.training.run.run_lock import (
    HEARTBEAT_S,
    SILENT_S,
    Owner,
    guard_name,
    in_use,
    is_valid,
)

log = logging.getLogger(__name__)
POLL_S = 2.0


class StoreLock:
    """The lock of an address, held by this process.

    Raises SettingsError if another process trains there, ObjectStoreError if the store fails.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._beats = store, 0
        self._owner = take(store, LOCK)
        self._is_over, self._mutex = threading.Event(), threading.Lock()
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="store lock", daemon=True).start()

    @property
    def is_held(self) -> bool:
        """False after its release."""
        return not self._is_over.is_set()

    def check(self) -> None:
        """Raises ObjectStoreError unless this process still holds the lock."""
        found = _read(self._store, LOCK)
        if found is None or found[0] is None:
            state = "is gone" if found is None else "cannot be read"
            raise ObjectStoreError(
                f"{self._store.address}/{LOCK} {state}; it is written again within "
                f"{HEARTBEAT_S:.0f} s unless another training starts there"
            )
        if found[0].token != self._owner.token:
            raise ObjectStoreError(
                f"{self._store.address}: another process has taken over this run"
            )

    def release(self) -> None:
        """Removes the lock if this process holds it."""
        with self._mutex:  # a renewal that has begun ends first
            if self._is_over.is_set():
                return
            self._is_over.set()
        atexit.unregister(self.release)
        with contextlib.suppress(ObjectStoreError):
            self.check()
            self._store.remove([LOCK])

    def _beat(self) -> None:
        while not self._is_over.wait(HEARTBEAT_S):
            try:
                found = _read(self._store, LOCK)
                other = None if found is None else found[0]
                if other is not None and other.token != self._owner.token:
                    break
                self._beats += 1
                with self._mutex:
                    if not self._is_over.is_set():
                        self._store.write(LOCK, _contents(self._owner, self._beats))
            except ObjectStoreError:  # the mirror reports it
                continue
        if not self._is_over.is_set():
            exit_now(
                f"{self._store.address}: another process has taken over this run after "
                f"{SILENT_S:.0f} s of silence; this one ends and uploads nothing"
            )


_held: dict[str, StoreLock] = {}
"""Locks of this process, by address."""


def lock_of(store: ObjectStore) -> StoreLock:
    """The lock of an address, which all trainers of this process share. Raises as StoreLock."""
    lock = _held.get(store.address)
    if lock is None or not lock.is_held:
        lock = _held[store.address] = StoreLock(store)
    return lock


def take(store: ObjectStore, name: str) -> Owner:
    """Creates a lock object, or replaces a stale one. Returns this process as its owner."""
    owner = Owner.this_process()
    while not store.create(name, _contents(owner, 0)):
        found = _read(store, name)
        if found is None:  # its owner has just released it
            continue
        other, _ = found
        reason = _why_stale(store, name, other)
        if reason is None and store.read(name) is None:
            continue
        if reason is None:
            raise in_use(store.address, other)
        if _replaced(store, name, owner, other):
            log.warning("taking over %s: %s (%s)", store.address, other or "its lock", reason)
            break
    return owner


def _replaced(store: ObjectStore, name: str, owner: Owner, stale: Owner | None) -> bool:
    """Replaces a stale lock. Returns False if it has changed in the meantime."""
    guard = guard_name(name, stale)
    take(store, guard)
    try:
        found = _read(store, name)
        if found is None or (found[0] and found[0].token) != (stale and stale.token):
            return False
        store.write(name, _contents(owner, 0))
        return True
    finally:
        store.remove([guard])


def _why_stale(store: ObjectStore, name: str, owner: Owner | None) -> str | None:
    """The reason why a lock is stale; None if its owner still trains, or has just ended."""
    if owner is not None and owner.is_here:
        return "is gone" if owner.is_gone() else None
    first = _read(store, name)
    log.warning(
        "%s: found the lock of %s; waiting up to %.0f s to see whether it is renewed",
        *(store.address, owner or "an unknown process", SILENT_S),
    )
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(min(POLL_S, SILENT_S / 10))
        if _read(store, name) != first:
            return None
    return f"has been silent for {SILENT_S:.0f} s"


def _contents(owner: Owner, beats: int) -> bytes:
    return json.dumps({**asdict(owner), "beats": beats}).encode()


def _read(store: ObjectStore, name: str) -> tuple[Owner | None, object] | None:
    """The owner (None if it cannot be read) and what grows; None if there is no lock."""
    data = store.read(name)
    if data is None:
        return None
    try:
        values = dict(parse_json(data))
        beats = values.pop("beats", None)
        owner = Owner(**values)
        return (owner if is_valid(owner) else None), beats
    except (SettingsError, TypeError, ValueError):
        return None, data
