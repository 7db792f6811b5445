"""Lhotse SHAR: manifests of cuts, and their recordings packed into tars beside them or elsewhere.

Only the headers of the tars are read; each clip remembers where its bytes are. A recording that is
not packed is read where its manifest says.
"""

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechlm2_jax.data.config import SharPath
from speechlm2_jax.data.conversations import AudioClip, Conversation
from speechlm2_jax.data.readers import (
    Reading,
    channel_of_cut,
    clip_of_cut,
    conversation_of_cut,
    expand_shards,
    local_file,
    read_cuts,
    refuse_url,
)
from speechlm2_jax.settings import SettingsError

CUTS, RECORDING = "cuts", "recording"
_NO_AUDIO = ("json", "nodata", "nometa")
_PLACEHOLDER = "shar"
"""Lhotse's type of a source whose bytes are in a tar."""


@dataclass(frozen=True, kw_only=True)
class PackedRecordings:
    """The recordings of one field in one shard."""

    absence: str
    """What to say of a recording that should be packed, and is not."""
    tar: str = ""
    members: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By the id of the cut: first byte and size."""

    def clip(self, cut: Any, recording: Any, *, channel: int | None) -> AudioClip | None:
        """The stretch of a cut; None if its recording is not packed, but a file of its own.

        Raises SettingsError if the recording is a mere placeholder, and nothing takes its place.
        """
        if cut.id in self.members:
            return AudioClip(
                id=cut.id,
                path=self.tar,
                offset_s=float(cut.start),
                duration_s=float(cut.duration),
                channel=channel,
                byte_range=self.members[cut.id],
            )
        if recording is None or any(s.type == _PLACEHOLDER for s in recording.sources):
            raise SettingsError(f"{self.absence}; the recording of cut {cut.id!r} is to be in it")
        return None


def read_shar(shar: SharPath | Path, reading: Reading) -> Iterator[Conversation]:
    """Reads SHAR: one folder or several, or the files of each field (`cuts`, `recording`)."""
    for cut, (recordings,) in shar_cuts(shar, (RECORDING,)):
        has_own = getattr(cut, "recording", None) is not None
        channel = channel_of_cut(cut, reading.channel) if has_own else reading.channel
        clip = recordings.clip(cut, getattr(cut, "recording", None), channel=channel)
        yield conversation_of_cut(cut, clip or clip_of_cut(cut, reading.channel), reading)


def shar_cuts(
    shar: SharPath | Path, fields: tuple[str, ...]
) -> Iterator[tuple[Any, tuple[PackedRecordings, ...]]]:
    """Each cut of SHAR, and per field the recordings that are packed for its shard.

    Raises SettingsError for a folder that is no SHAR, and for a listed file that is missing.
    """
    for manifest, packed in _shards(shar, fields):
        for cut in read_cuts(manifest, fields=fields):
            yield cut, packed


Shard = tuple[Path, tuple[PackedRecordings, ...]]
"""A manifest of cuts, and what is packed for each field."""


def _shards(shar: SharPath | Path, fields: tuple[str, ...]) -> Iterator[Shard]:
    if isinstance(shar, Mapping):
        yield from _listed(shar, fields)
    elif isinstance(shar, tuple):
        for part in shar:
            yield from _folder(part if isinstance(part, str) else part[0], fields)
    else:
        yield from _folder(shar, fields)


def _folder(path: str | Path, fields: tuple[str, ...]) -> Iterator[Shard]:
    """The shards of a folder: `cuts.000000.jsonl.gz` beside `recording.000000.tar`."""
    refuse_url(str(path), str(path))
    folder = Path(path).expanduser()
    manifests = sorted(folder.glob("cuts.*jsonl.gz")) + sorted(folder.glob("cuts.*jsonl"))
    if not manifests:
        raise SettingsError(f"{folder}: not a SHAR folder (no cuts.*.jsonl.gz in it)")
    for manifest in manifests:
        shard = manifest.name.removeprefix(CUTS).partition(".jsonl")[0]
        tars = [folder / f"{name}{shard}.tar" for name in fields]
        yield manifest, tuple(_packed(tar) if tar.is_file() else _missing(tar) for tar in tars)


def _listed(shar: Mapping[str, Any], fields: tuple[str, ...]) -> Iterator[Shard]:
    """The shards of fields that are listed file by file."""
    files = {name: expand_shards(shar[name]) for name in (CUTS, *fields) if name in shar}
    for name, paths in files.items():
        if len(paths) != len(files[CUTS]):
            raise SettingsError(
                f"shar_path: {len(files[CUTS])} files of {CUTS} and {len(paths)} of {name}; list "
                "one of each per shard"
            )
    for number, manifest in enumerate(files[CUTS]):
        packed = (
            _packed(local_file(files[name][number]))
            if name in files
            else PackedRecordings(absence=f"shar_path: lists no {name}")
            for name in fields
        )
        yield local_file(manifest), tuple(packed)


def _missing(tar: Path) -> PackedRecordings:
    return PackedRecordings(absence=f"{tar}: no such file")


def _packed(tar: Path) -> PackedRecordings:
    """Where each recording of a tar is, by its name without suffix."""
    try:
        with tarfile.open(tar, "r:") as archive:
            members = {
                name: (member.offset_data, member.size)
                for member in archive
                for name, _, suffix in [member.name.rpartition(".")]
                if member.isfile() and suffix not in _NO_AUDIO
            }
    except (tarfile.TarError, OSError) as error:
        raise SettingsError(f"{tar}: not a tar archive ({error})") from error
    return PackedRecordings(absence=f"{tar}: not in this tar", tar=str(tar), members=members)
