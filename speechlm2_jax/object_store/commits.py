"""Records of whole checkpoints: written after their files, and compared with them when read."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from speechlm2_jax.checkpointing import CHECKPOINTS, read_checksums
from speechlm2_jax.checkpointing.checksums import CHECKSUMS, checksum_of_file
from speechlm2_jax.object_store.objects import ObjectStore, path_below
from speechlm2_jax.settings import SettingsError, parse_json

COMMITTED = "committed"
FROZEN = "frozen"
_STEP = re.compile("0|[1-9][0-9]*")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """What a record tells of one file."""

    size: int
    """In bytes."""
    checksum: str
    """The xxh3_128 of its bytes, in hex."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record of a step, or of the frozen parameters."""

    name: str
    """The step, or `frozen`."""
    files: Mapping[str, StoredFile]
    """By path below the folder of the step."""

    @staticmethod
    def of(name: str, folder: Path) -> "Commit":
        """The record of a local folder, by the checksums in it; others are computed.

        Raises DamagedError if its list of checksums is damaged, FileNotFoundError if files vanish.
        """
        listed = read_checksums(folder)
        known = {} if listed is None else listed.files
        files: dict[str, StoredFile] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            below = path.relative_to(folder).as_posix()
            if below in known or below == CHECKSUMS or listed is None:
                checksum = known.get(below) or checksum_of_file(path)
                files[below] = StoredFile(size=path.stat().st_size, checksum=checksum)
        if missing := sorted(known.keys() - files.keys()):
            raise FileNotFoundError(str(folder / missing[0]))
        return Commit(name=name, files=files)

    @property
    def total_bytes(self) -> int:
        """The size of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def object_name(self) -> str:
        """The name of the record in the store."""
        return f"{COMMITTED}/{self.name}"

    def file_name(self, below: str) -> str:
        """The name in the store of a file of the folder."""
        return f"{CHECKPOINTS}/{self.name}/{below}"

    def is_in(self, folder: Path, *, reads_all: bool) -> bool:
        """Whether a local folder holds these files.

        Compares sizes and the list of checksums; with `reads_all` the contents of every file.
        """
        try:
            for below, file in self.files.items():
                path = path_below(folder, below)
                if path.stat().st_size != file.size:
                    return False
                if (reads_all or below == CHECKSUMS) and checksum_of_file(path) != file.checksum:
                    return False
        except OSError:
            return False
        return folder.is_dir()

    def missing(self, sizes: Mapping[str, int]) -> str | None:
        """The first file that a listing of the store lacks or has in another size, or None."""
        names = ((self.file_name(below), file.size) for below, file in self.files.items())
        return next((name for name, size in names if sizes.get(name) != size), None)

    def to_bytes(self) -> bytes:
        """The record as JSON, and a checksum of it."""
        values = {below: [file.size, file.checksum] for below, file in self.files.items()}
        text = json.dumps({"name": self.name, "files": values}, indent=0)
        return f"{text}\n{xxhash.xxh3_128_hexdigest(text.encode())}\n".encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Commit | None":
        """Reads a record; None if it is damaged, of another format, or names files elsewhere."""
        try:
            text, _, checksum = data.decode().rstrip("\n").rpartition("\n")
            if xxhash.xxh3_128_hexdigest(text.encode()) != checksum:
                return None
            values = parse_json(text)
            files = {
                str(below): StoredFile(size=int(size), checksum=str(checksum))
                for below, (size, checksum) in values["files"].items()
            }
            for below in files:
                path_below(Path(), below)
            return Commit(name=str(values["name"]), files=files)
        except (SettingsError, ValueError, KeyError, TypeError, AttributeError):
            return None


def read_commits(store: ObjectStore, sizes: Mapping[str, int]) -> dict[str, Commit]:
    """The valid records of a store, whose listing is `sizes`, by name.

    The frozen parameters come first, then the steps, the oldest first. A warning names records that
    cannot be read: they and their files stay, and are not used.
    """
    recorded = [name.partition("/")[2] for name in sizes if name.startswith(f"{COMMITTED}/")]
    names = filter(is_checkpoint, recorded)
    found: dict[str, Commit] = {}
    for name in sorted(names, key=lambda name: (name.isdigit(), len(name), name)):
        data = store.read(f"{COMMITTED}/{name}")
        commit = None if data is None else Commit.from_bytes(data)
        if commit is not None and commit.name == name:
            found[name] = commit
        elif data is not None:
            log.warning(
                "%s/%s/%s cannot be read: it is damaged, or a newer version wrote it; this "
                "checkpoint is left there and not used",
                *(store.address, COMMITTED, name),
            )
    return found


def is_checkpoint(name: str) -> bool:
    """Whether this is the name of a checkpoint: a step, or the frozen parameters."""
    return name == FROZEN or _STEP.fullmatch(name) is not None


def steps_of(commits: Mapping[str, Commit]) -> list[int]:
    """The committed steps, newest first."""
    return sorted((int(name) for name in list(commits) if name.isdigit()), reverse=True)
