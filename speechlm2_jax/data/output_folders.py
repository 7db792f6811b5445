"""Checks, before hours of work, that a folder of outputs can be written."""

import tempfile
from pathlib import Path

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
