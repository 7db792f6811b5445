"""The local folders that belong to an address, in the user's cache."""

import os
from pathlib import Path

import xxhash

from speechlm2_jax.data.storage.addresses import is_remote, name_of, normalised, scheme_of

CACHE_VARIABLE = "SPEECHLM2_JAX_RUN_CACHE"
"""Environment variable that names another cache folder."""
_ADDRESS = "address"
_WORKING, _COPY = "run", "copy"


def is_address(name: str) -> bool:
    """Whether this is an address of an object store, and no path."""
    return is_remote(name)


def local_path(name: str) -> Path:
    """The path that `name` means; of a `file://` address what follows it."""
    is_file_address = scheme_of(name) == "file" and name[:7].lower() == "file://"
    return Path(name[7:] if is_file_address else name)


def working_folder(address: str) -> Path:
    """The folder in which the run at an address works. Its parent is made. Raises SettingsError."""
    return _folder(address, _WORKING)


def copy_folder(address: str) -> Path:
    """The folder of what readers of an address have downloaded. Its parent is made."""
    return _folder(address, _COPY)


def address_of(folder: Path) -> str | None:
    """The address that a folder belongs to; None for any other folder."""
    if folder.name not in (_WORKING, _COPY):
        return None
    try:
        return (folder.parent / _ADDRESS).read_text(encoding="utf-8")
    except OSError:
        return None


def shown(folder: Path) -> str:
    """A run directory for messages: its address, if it has one."""
    return address_of(folder) or str(folder)


def cache() -> Path:
    """The folder of all local folders of addresses."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "speechlm2_jax" / "runs"


def _folder(address: str, kind: str) -> Path:
    address = normalised(address).rstrip("/")
    folder = cache() / f"{name_of(address)}-{xxhash.xxh3_64_hexdigest(address.encode())}"
    named = folder / _ADDRESS
    if not named.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = named.with_name(f".{_ADDRESS}.{os.getpid()}")
        draft.write_text(address, encoding="utf-8")
        draft.replace(named)
    return folder / kind
