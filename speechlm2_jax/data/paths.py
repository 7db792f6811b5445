"""Paths and addresses of manifests and recordings, however they are spelt."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

from speechlm2_jax.bundled import with_bundled
from speechlm2_jax.data.storage.access import current
from speechlm2_jax.data.storage.addresses import is_remote, joined, parent
from speechlm2_jax.data.storage.downloads import local_copy, origin_of
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.settings import SettingsError

MAX_SHARDS = 1_000_000
"""Paths that one pattern of shards may stand for."""
_FILE_ADDRESS = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_SHARDS = re.compile(r"(?:_OP_|[{(\[<])(\d+)\.\.(\d+)(?:_CL_|[})\]>])")
_AT_ONCE = 8
"""Files that are copied at once."""


def plain_path(path: str) -> str:
    """A path of this machine; the address `file:///a%20b` and `~` are spelt out.

    A bundled file has the name `corpus/...` wherever the program runs.

    Raises SettingsError for an address of another machine and for a command.
    """
    match = _FILE_ADDRESS.fullmatch(path)
    if match and match["host"] in (None, "", "localhost"):
        decoded = unquote(match["path"])
        # written without encoding, as by putting file:// before a path, `%` means itself
        is_plain = is_allowed_file(match["path"]) and not is_allowed_file(decoded)
        return match["path"] if is_plain else decoded
    if _URL.match(path):
        raise SettingsError(f"{path} is not on this machine; copy it to a local disk")
    return with_bundled(os.path.expanduser(path) if path.startswith("~") else path)


def stem(path: str) -> str:
    """The last part of a path without its suffix: `Path.stem`, which is slow, of usual names."""
    before, dot, end = path.rpartition("/")[2].rpartition(".")
    return before if dot and end and before.strip(".") else Path(path).stem


def is_file(path: str | Path) -> bool:
    """Whether a file exists; False for an invalid name too."""
    return os.path.isfile(path)


def checked_path(path: str) -> str:
    """A path of this machine as `plain_path` gives it, or an address of remote storage.

    Raises SettingsError for what settings do not allow, and for a command.
    """
    storage = current()
    return storage.check(path if is_remote(path) else plain_path(path))


def local_file(path: str | Path) -> Path:
    """The path of a file that exists on this machine, or of a copy of a remote one.

    Raises SettingsError if there is none, or settings do not allow it.
    """
    name = checked_path(str(path))
    if is_remote(name):
        return local_copy(name, current())
    found = Path(name)
    if is_file(found):
        return found
    if os.path.isdir(found):
        inside = sorted(p.name for p in found.glob("*.json*"))
        hint = f"for instance {found / inside[0]}" if inside else "none is in it"
        shar = any(name.startswith("cuts.") for name in inside)
        hint = "it is SHAR: set shar_path" if shar else f"name a manifest, {hint}"
        raise SettingsError(f"{path}: is a folder; {hint}")
    raise SettingsError(f"{_short(str(path))}: no such file")


def local_files(paths: Iterable[str]) -> list[Path]:
    """The same of several files; remote ones are copied many at a time."""
    listed, storage = list(paths), current()
    remote = [path for path in listed if is_remote(path)]
    if len(remote) > 1:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copies") as pool:
            list(pool.map(lambda path: local_copy(path, storage), remote))
    return [local_file(path) for path in listed]


def packed_file(path: str | Path) -> str:
    """A file of many recordings: its path if it exists, or its address. Raises SettingsError."""
    name = checked_path(str(path))
    return name if is_remote(name) else str(local_file(name))


def local_folder(path: str | Path) -> Path:
    """The path of a folder that exists on this machine. Raises SettingsError if it does not."""
    name = checked_path(str(path))
    if is_remote(name):
        raise SettingsError(f"{path}: a remote folder cannot be read here; copy it to a local disk")
    found = Path(name)
    if os.path.isdir(found):
        return found
    is_other = is_file(found)
    raise SettingsError(f"{_short(str(path))}: " + ("is a file" if is_other else "no such folder"))


def expand_shards(paths: str | Iterable[str]) -> list[str]:
    """Expands `{0..3}` and NeMo's `_OP_0..3_CL_` in paths.

    Raises SettingsError for a pattern that counts down or stands for more than MAX_SHARDS paths.
    """
    todo, done = [paths] if isinstance(paths, str) else list(paths), []
    for path in todo:
        _check_pattern(path)
    while todo:
        path = todo.pop()
        match = _SHARDS.search(path)
        if match is None:
            done.append(path)
            continue
        low, high = int(match[1]), int(match[2])
        numbers = [str(n).zfill(len(match[1])) for n in range(low, high + 1)]
        todo += [path[: match.start()] + n + path[match.end() :] for n in numbers]
    return done[::-1]


def _check_pattern(path: str) -> None:
    count = 1
    for low, high in _SHARDS.findall(path):
        if len(low + high) > 2 * len(str(MAX_SHARDS)) or int(high) - int(low) >= MAX_SHARDS:
            raise SettingsError(f"{_short(path)}: {low}..{high} are too many shards")
        if int(high) < int(low):
            raise SettingsError(f"{path}: {low}..{high} counts down; write {high}..{low}")
        count *= int(high) - int(low) + 1
    if count > MAX_SHARDS:
        raise SettingsError(f"{_short(path)}: stands for {count} files, at most {MAX_SHARDS}")


class Finder:
    """Audio paths of one manifest: relative ones lie beside it or, failing that, here.

    The first relative path decides for the whole manifest, so a disk is asked once. Relative paths
    of a copy of a remote manifest are addresses beside the original.
    """

    def __init__(self, manifest: Path) -> None:
        self._manifest, self.storage = manifest, current()
        self._folder = ""
        origin = origin_of(manifest)
        self._base = None if origin is None else parent(origin)
        self._is_restricted = self.storage.roots is not None or self.storage.schemes is not None

    @classmethod
    def of_folder(cls, folder: str) -> "Finder":
        """Of relative paths in a folder, local or remote. Raises SettingsError for none."""
        if not is_remote(folder):
            return cls(local_folder(folder) / "manifest")
        finder = cls(Path())
        finder._base = checked_path(folder)
        return finder

    def __call__(self, path: str) -> str:
        """The absolute path, or the address. Raises SettingsError for what is not allowed."""
        if is_remote(path):
            return self.storage.check(path)
        path = plain_path(path)
        if self._base is not None and not os.path.isabs(path):
            return self.storage.check(joined(self._base, path))
        found = self._found(path)
        return self.storage.check(found) if self._is_restricted else found

    def _found(self, path: str) -> str:
        if os.path.isabs(path):
            return path
        if not self._folder:
            beside = self._manifest.parent
            here = not self._exists(beside / path) and self._exists(Path(path))
            self._folder = str(Path.cwd() if here else beside.absolute())
        is_plain = "./" not in path and "//" not in path  # else Path writes it in one form
        return f"{self._folder}/{path}" if is_plain else str(Path(self._folder, path))

    def _exists(self, path: Path) -> bool:
        """Whether a path exists; of what is not allowed nothing is looked for."""
        try:
            return os.path.exists(self.storage.check(str(path)))
        except StorageError:
            return False


def is_allowed_file(path: str | Path) -> bool:
    """Whether a file exists that settings allow; what they do not is not even looked for."""
    try:
        return is_file(current().check(str(path)))
    except StorageError:
        return False


def _short(path: str) -> str:
    return path if len(path) <= 255 else f"{path[:60]}... ({len(path)} letters)"


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and in the folders below it, sorted; links to folders are followed.

    A folder that is reached twice is listed once. Broken links are listed too.
    """
    seen: set[str] = set()
    found: list[Path] = []
    for place, inside, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        inside.sort()
        inside[:] = [d for d in inside if os.path.realpath(os.path.join(place, d)) not in seen]
        found += [Path(place, name) for name in names]
    return sorted(found)
