"""Versions of the remote tars of a run: so one that is replaced meanwhile is noticed."""

import logging
import threading
import time
from dataclasses import dataclass

from speechlm2_jax.data.storage.errors import StorageError

EVERY_S = 30.0
"""Seconds between two questions for the version of a tar whose members are being read."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass
class _Listed:
    """A tar whose members were listed, to be read at random."""

    version: str
    """Empty: not known."""
    asked_s: float
    is_told: bool = False


_listed: dict[str, _Listed] = {}
_streamed: dict[str, str] = {}
"""The versions of tars that are read from front to end; empty: not known."""


def remember(address: str, version: str) -> None:
    """Keeps the version that the members of a tar were listed of."""
    with _lock:
        _listed[address] = _Listed(version, time.monotonic())


def is_due(address: str) -> bool:
    """Whether it is time to ask for the version of a tar again, or for the first time."""
    with _lock:
        known, now_s = _listed.get(address), time.monotonic()
        if known is not None and now_s - known.asked_s < EVERY_S:
            return False
        if known is not None:
            known.asked_s = now_s
        return True


def keep_or_check(address: str, version: str) -> None:
    """Keeps the first version of a tar in this process, or compares another one with it.

    Raises StorageError, `changed`.
    """
    if address not in _listed:
        remember(address, version)
    check(address, version)


def check(address: str, version: str) -> None:
    """Compares the version of a tar with that of which its members were listed, if they were.

    Raises StorageError, `changed`, for another one, of which a warning tells once.
    """
    known = _listed.get(address)
    if known is None or not version or known.version in ("", version):
        return
    if not known.is_told:
        known.is_told = True
        _tell(address, "its recordings are left out as `changed`")
    raise StorageError(f"{address}: changed since its members were listed", cause="changed")


def follow(address: str) -> None:
    """Makes a tar known that is read from front to end; the first reading tells its version."""
    with _lock:
        _streamed.setdefault(address, "")


def renew(address: str, version: str) -> None:
    """Keeps the version of a tar that is read from front to end, and warns of a new one."""
    known = _streamed.get(address)
    if known is None or not version:
        return
    if known not in ("", version):
        _tell(address, "the stream reads it anew, and the run cannot be resumed exactly")
    _streamed[address] = version


def _tell(address: str, what: str) -> None:
    _log.warning(
        "%s: changed since this run read it: %s; write changed data to a new file", address, what
    )
