"""Names of files and folders that are misspelt. Imports nothing heavy."""

import difflib
from pathlib import Path

from speechlm2_jax.settings import SettingsError

RUNS = Path("runs")
LOCAL_SUFFIXES = (".nemo", ".ckpt", ".bin", ".safetensors", ".gguf")
"""Names that end so are files, never repositories."""


def nearest_path(name: str) -> str | None:
    """An existing path that differs from `name` in one misspelt folder or file name, or None."""
    path, parts = Path(name).expanduser(), Path(name).parts
    found = Path(path.anchor) if path.is_absolute() else Path()
    for place, part in enumerate(path.parts[1:] if path.is_absolute() else parts):
        if not (found / part).exists():
            near = difflib.get_close_matches(part, _names_in(found), n=1)
            rest = path.parts[1 + place + path.is_absolute() :]
            fixed = found.joinpath(near[0], *rest) if near else None
            return str(fixed) if fixed is not None and fixed.exists() else None
        found = found / part
    return None


def check_run_name(name: str, *, key: str) -> None:
    """Raises SettingsError naming `key` if no path has a name, and that of a run is like it.

    Such a name also has the form of a hub repository, ORGANISATION/MODEL, so it is told at once.
    """
    near = nearest_path(name)
    if near is not None and Path(near).is_relative_to(RUNS):
        raise SettingsError(f"{key}: no such run: {name!r}; did you mean {near!r}?")


def check_missing(name: str, *, key: str) -> None:
    """Checks a name that no path has. Raises SettingsError naming `key` if no hub can have it."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local or name.endswith(LOCAL_SUFFIXES):
        near = nearest_path(name)
        hint = f"; did you mean {near!r}?" if near else ""
        raise SettingsError(f"{key}: no such file or directory: {name!r}{hint}")
    check_run_name(name, key=key)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
