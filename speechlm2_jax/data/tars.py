"""The members of a tar, by its headers alone: where the bytes of each are."""

import tarfile
from collections import defaultdict
from pathlib import Path

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.paths import local_file, packed_file
from speechlm2_jax.data.remote_tars import remote_members
from speechlm2_jax.data.storage.access import current
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.tar_headers import TarMember, read_headers
from speechlm2_jax.settings import SettingsError

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes -> the program that made them."""


def tar_members(path: str | Path) -> list[TarMember]:
    """The files in a tar, in order.

    Raises SettingsError for a file that is missing, no tar, compressed (its members could only be
    read one after another), or damaged, as one that was not copied to its end.
    """
    if is_remote(str(path)):
        address = packed_file(path)
        found = remote_members(address, current(), lambda head: check_plain(address, head))
        return [member._replace(name=plain_name(member.name)) for member in found]
    tar = local_file(path)
    members: list[TarMember] = []
    try:
        with open(tar, "rb") as file:
            check_plain(str(tar), file.read(8))
            for member in read_headers(file.fileno()):
                members.append(member._replace(name=plain_name(member.name)))
    except (tarfile.TarError, OSError, ValueError) as error:
        behind = f", behind {members[-1].name!r}" if members else ""
        raise SettingsError(
            f"{tar}: not a tar archive, or damaged ({error}{behind}); copy or make it again"
        ) from error
    return members


class TarRecordings:
    """The recordings of a tar, found by name.

    Of several members of one name, each request takes the next, and the last one from then on.
    """

    def __init__(self, tar: str | Path) -> None:
        self.tar, self._storage = packed_file(tar), current()
        self.members = tar_members(self.tar)
        self._found: defaultdict[str, list[TarMember]] = defaultdict(list)
        for member in self.members:
            self._found[member.name].append(member)

    def __contains__(self, name: str) -> bool:
        return plain_name(name) in self._found

    def __call__(self, name: str) -> AudioLocation:
        """Where a recording is. Raises SettingsError for one that is not in the tar."""
        found = self._found.get(plain_name(name))
        if not found:
            raise SettingsError(f"{name!r} is not in {self.tar}; name a member of the tar")
        return self.location(found.pop(0) if len(found) > 1 else found[0])

    def location(self, member: TarMember) -> AudioLocation:
        """Where a member is."""
        return AudioLocation(self.tar, (member.start, member.size), storage=self._storage)


def check_plain(tar: str, head: bytes) -> None:
    """Raises SettingsError for a compressed tar, by its first bytes."""
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise SettingsError(
                f"{tar}: is compressed by {program}, so its members cannot be read at random; "
                "decompress it (recordings are compressed already)"
            )


def plain_name(name: str) -> str:
    """The name of a member without the `./` that `tar cf x.tar .` writes before it."""
    return name.removeprefix("./")
