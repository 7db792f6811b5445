"""Checks, before hours of work, that outputs can be written, and by one process alone."""

import tempfile
from pathlib import Path
from typing import IO

from speechlm2_jax.settings import SettingsError


def check_writable(folder: Path, option: str) -> None:
    """Raises SettingsError if no file can be written in `folder`, which need not be there yet.

    `option` is what names another folder, as "--output-dir". Nothing is left in the folder.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there, prefix="."):
            pass
    except OSError as error:
        raise SettingsError(
            f"{folder}: cannot be written ({error.strerror}: {there}); name another folder with "
            f"{option}"
        ) from error


def lock_file(file: IO[bytes]) -> bool:
    """Locks an open file until it is closed, or its process ends; False if another has it locked.

    True, too, on a file system without locks.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
