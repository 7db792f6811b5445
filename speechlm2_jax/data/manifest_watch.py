"""Notices that manifests change while a run uses them."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speechlm2_jax.data.input_config import InputConfig, Paths
from speechlm2_jax.data.paths import expand_shards, local_files, plain_path
from speechlm2_jax.data.shar import CUTS, files_of_remote_folder
from speechlm2_jax.data.storage.addresses import is_remote

EVERY_S = 30.0
"""Seconds between two looks."""
FILES_AT_ONCE = 64
"""Files of one look: a network disk takes a millisecond for each."""

_log = logging.getLogger(__name__)
_State = tuple[int, int] | None
"""Size and time of the last change; None: no such file."""


def manifest_files(entry: InputConfig, *, is_stream: bool = False) -> tuple[str, ...]:
    """The manifests of an entry, or its texts, and its tars; of SHAR the files of cuts and tars.

    Of remote ones their copies; none of a stream, which copies each when its turn comes.
    """
    return (*row_files(entry, is_stream=is_stream), *_tar_files(entry))


def row_files(entry: InputConfig, *, is_stream: bool = False) -> tuple[str, ...]:
    """The same without tars: the files whose lines are rows."""
    shar = entry.shar_path
    if isinstance(shar, Mapping):
        return tuple(_files(shar[CUTS], is_stream))
    if shar is not None:
        return tuple(file for folder in _folders(shar) for file in _cuts(folder, is_stream))
    listed = (entry.manifests, entry.paths, entry.source_paths, entry.target_paths)
    return tuple(file for paths in listed for file in _files(paths or (), is_stream))


def _tar_files(entry: InputConfig) -> Iterator[str]:
    shar, folder = entry.shar_path, entry.data_dir
    if isinstance(shar, Mapping):
        for name, files in shar.items():
            yield from () if name == CUTS else _tars(files)
    elif shar is not None or folder is not None:
        for one in _folders(folder if shar is None else shar):
            found = () if is_remote(one) else sorted(_folder(one).glob("*.tar"))
            yield from map(str, found)
    elif entry.tarred_audio_filepaths is not None:
        for _, tars in entry.tarred:
            yield from _tars(tars)


def _folders(shar: str | tuple[str | tuple[str, float], ...] | None) -> list[str]:
    listed = [shar] if isinstance(shar, str) else shar or ()
    return [one if isinstance(one, str) else one[0] for one in listed]


def _files(paths: Paths, is_stream: bool) -> tuple[str, ...]:
    listed = expand_shards(paths)
    if is_stream:
        listed = [path for path in listed if not is_remote(path)]
    elif any(map(is_remote, listed)):
        return tuple(map(str, local_files(listed)))
    return tuple(map(plain_path, listed))


def _tars(paths: Paths) -> list[str]:
    """The tars of this machine: remote ones are not asked for."""
    return [plain_path(path) for path in expand_shards(paths) if not is_remote(path)]


def _folder(path: str) -> Path:
    return Path(plain_path(path))


def _cuts(folder: str, is_stream: bool) -> list[str]:
    """The files of cuts in a folder of SHAR, of a remote one their copies."""
    if is_remote(folder) and is_stream:
        return []
    if is_remote(folder):
        return [str(path) for path in local_files(files_of_remote_folder(folder, ())[CUTS])]
    found = [path for end in ("", ".gz") for path in _folder(folder).glob(f"cuts.*jsonl{end}")]
    return [str(path) for path in sorted(found)]  # not the index beside one


@dataclass(kw_only=True)
class ManifestWatch:
    """Looks at some manifests from time to time, and warns once of each that has changed."""

    where: str
    """Of the data set, for the message."""
    files: Sequence[str]
    _before: dict[str, _State] = field(default_factory=dict)
    _next: int = 0
    _looked_s: float = 0.0

    def __post_init__(self) -> None:
        """Remembers how they are now."""
        self._before = {path: _state(path) for path in self.files}
        self._looked_s = time.monotonic()

    def look(self, now_s: float | None = None) -> None:
        """Warns of changes, if it is time to look."""
        now_s = time.monotonic() if now_s is None else now_s
        if now_s - self._looked_s < EVERY_S:
            return
        self._looked_s = now_s
        known = list(self._before)
        for path in known[self._next : self._next + FILES_AT_ONCE]:
            if (state := _state(path)) != self._before[path]:
                _log.warning("%s: %s %s", self.where, path, _told(self._before[path], state))
                self._before[path] = state
        self._next = 0 if self._next + FILES_AT_ONCE >= len(known) else self._next + FILES_AT_ONCE


def _told(before: _State, now: _State) -> str:
    what = "is gone" if now is None else "changed"
    sizes = f" ({before[0]} bytes, now {now[0]})" if before and now else ""
    return (
        f"{what} since this run began{sizes}: what is in memory stays, changed rows of an index "
        "are left out, a stream reads it anew, and the run cannot be resumed exactly; write "
        "changed data to a new file"
    )


def _state(path: str) -> _State:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
