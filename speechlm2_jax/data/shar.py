"""Lhotse SHAR: manifests of cuts, and their fields beside them or elsewhere.

Recordings are packed into tars, of which only the headers are read: each clip remembers where its
bytes are. A recording that is not packed is read from the path in its manifest.
Any other field is a file of JSON lines, one for each cut, whose values belong to the cuts.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from speechlm2_jax.data.conversations import AudioClip, Conversation
from speechlm2_jax.data.cuts import (
    LocatedCut,
    channel_of_cut,
    clip_of_cut,
    conversations_of_cuts,
    read_cuts,
    stretch_of_cut,
)
from speechlm2_jax.data.input_config import Paths, SharPath
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.lhotse_types import Cut, Recording
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import (
    expand_shards,
    local_file,
    local_files,
    local_folder,
    packed_file,
)
from speechlm2_jax.data.storage.access import current
from speechlm2_jax.data.storage.addresses import is_remote, joined
from speechlm2_jax.data.tars import tar_members
from speechlm2_jax.settings import SettingsError

CUTS, RECORDING = "cuts", "recording"
NO_AUDIO = ("json", "nodata", "nometa")
PLACEHOLDER = "shar"
"""Lhotse's type of a source whose bytes are in a tar."""


@dataclass(frozen=True, kw_only=True)
class PackedRecordings:
    """The recordings of one field in one shard."""

    absence: str
    """What to say of a recording that should be packed, and is not."""
    tar: str = ""
    members: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """By the id of the cut, in order where several share it: first byte and size."""

    def clip(
        self, cut: Cut, recording: Recording | None, *, channel: int | None, number: int = 0
    ) -> AudioClip | None:
        """The stretch of a cut; None if its recording is not packed, but a file of its own.

        `number` counts the cuts of the shard that have the same id, from 0. Raises SettingsError if
        the recording is a mere placeholder, and nothing takes its place.
        """
        packed = self.members.get(cut.id, ())
        if number < len(packed):
            start_s, duration_s = stretch_of_cut(cut)
            return AudioClip(
                id=cut.id,
                path=self.tar,
                offset_s=start_s,
                duration_s=duration_s,
                channel=channel,
                is_segment=recording is None or start_s > 0 or duration_s < recording.duration,
                byte_range=packed[number],
            )
        if recording is None or any(s.type == PLACEHOLDER for s in recording.sources):
            raise SettingsError(f"{self.absence}; the recording of cut {cut.id!r} is to be in it")
        return None


@dataclass(frozen=True, kw_only=True)
class SharCut:
    """A cut, and what is packed for it."""

    cut: Cut
    where: str
    """The words that name its line."""
    shard: int = 0
    """Number of its shard, from 0."""
    packed: tuple[PackedRecordings, ...] = ()
    """Of its shard, one for each field that was asked for; none of a manifest without tars."""
    number: int = 0
    """How many cuts of the shard before it have the same id."""


@dataclass(frozen=True, kw_only=True)
class SharShard:
    """A manifest of cuts, the tar of each field, and the files of the other fields."""

    cuts: Path
    tars: tuple["SharTar", ...]
    values: Mapping[str, Path]

    @functools.cached_property
    def packed(self) -> tuple[PackedRecordings, ...]:
        """What is packed for each field."""
        return tuple(tar.recordings() for tar in self.tars)


class SharTar(NamedTuple):
    """The recordings of a field in one shard."""

    path: str | Path | None
    """Or an address; None: there is no tar."""
    absence: str = ""
    """What to say of a recording that should be in it."""

    def recordings(self) -> PackedRecordings:
        """Where each is, by its name without suffix. Raises SettingsError for a damaged tar."""
        if self.path is None:
            return PackedRecordings(absence=self.absence)
        members: dict[str, list[tuple[int, int]]] = {}
        for member in tar_members(self.path):
            name, _, suffix = member.name.rpartition(".")
            if suffix not in NO_AUDIO:
                members.setdefault(name, []).append((member.start, member.size))
        absence = f"{self.path}: not in this tar"
        return PackedRecordings(absence=absence, tar=str(self.path), members=members)


def read_shar(shar: SharPath | Path, options: ManifestOptions) -> Iterator[Conversation]:
    """Reads SHAR: one folder or several, or the files of each field (`cuts`, `recording`)."""
    cuts = (
        LocatedCut(one.where, one.cut, partial(clip_of, one, options.channel), one.shard)
        for one in shar_cuts(shar, (RECORDING,))
    )
    yield from conversations_of_cuts(cuts, options, "SHAR")


def clip_of(one: SharCut, setting: int | None) -> AudioClip:
    """The recording of a cut, packed or in a file."""
    cut, recording = one.cut, getattr(one.cut, "recording", None)
    channel = setting if recording is None else channel_of_cut(cut, setting)
    clip = one.packed[0].clip(cut, recording, channel=channel, number=one.number)
    return clip or clip_of_cut(cut, setting)


def shar_cuts(shar: SharPath | Path, fields: tuple[str, ...]) -> Iterator[SharCut]:
    """Each cut of SHAR with its values, and per field the recordings that are packed for it.

    Raises SettingsError for a folder that is no SHAR, for a listed file that is missing, and for a
    file of a field that does not go with its cuts.
    """
    for number, shard in enumerate(shar_shards(shar, fields)):
        yield from cuts_of_shard(shard, fields, number)


def cuts_of_shard(shard: SharShard, fields: tuple[str, ...], number: int) -> Iterator[SharCut]:
    """The cuts of one shard, which has this number."""
    seen: Counter[str] = Counter()
    for where, cut in cuts_with_values(shard, fields):
        yield SharCut(cut=cut, where=where, shard=number, packed=shard.packed, number=seen[cut.id])
        seen[cut.id] += 1


def cuts_with_values(shard: SharShard, fields: tuple[str, ...]) -> Iterator[tuple[str, Cut]]:
    """The cuts of a shard, each with the values of its fields, line by line."""
    cuts = read_cuts(shard.cuts, fields=fields)
    columns = {name: json_lines(path) for name, path in shard.values.items()}
    for both in zip_longest(cuts, *columns.values()):
        located_cut: Any = both[0]
        for name, line in zip(columns, both[1:], strict=True):
            if located_cut is None or line is None:
                raise SettingsError(
                    f"{shard.values[name]}: has {'fewer' if line is None else 'more'} lines than "
                    f"{shard.cuts} has cuts; each line is the {name} of one cut, in the same order"
                )
            _set_value(located_cut[1], name, line)
        yield located_cut


def _set_value(cut: Cut, name: str, line: tuple[str, Any]) -> None:
    """Gives a cut the value of a line, as Lhotse does; a line with no more than an id has none."""
    where, row = line
    if row.get("cut_id") != cut.id:
        raise SettingsError(
            f"{where}: cut_id is {row.get('cut_id')!r}, but the cut of this line is {cut.id!r}; "
            "each line is of one cut, in the same order"
        )
    if name in row:
        with located(where):
            setattr(cut, name, row[name])


def shar_shards(shar: SharPath | Path, fields: tuple[str, ...]) -> Iterator[SharShard]:
    """The shards of SHAR, whose files are not read yet. Raises SettingsError as `shar_cuts`."""
    if isinstance(shar, Mapping):
        yield from _listed(shar, fields)
    elif isinstance(shar, tuple):
        for part in shar:
            yield from _folder(part if isinstance(part, str) else part[0], fields)
    else:
        yield from _folder(shar, fields)


def _folder(path: str | Path, fields: tuple[str, ...]) -> Iterator[SharShard]:
    """The shards of a folder: `cuts.000000.jsonl.gz` beside `recording.000000.tar`."""
    if is_remote(str(path)):
        yield from _listed(files_of_remote_folder(str(path), fields), fields)
        return
    folder = local_folder(path)
    manifests = sorted(folder.glob("cuts.*jsonl.gz")) + sorted(folder.glob("cuts.*jsonl"))
    if not manifests:
        raise SettingsError(f"{folder}: not a SHAR folder (no cuts.*.jsonl.gz in it)")
    columns = {p.name.partition(".")[0] for p in folder.iterdir() if _is_lines(p.name)}
    columns -= {CUTS, *fields}
    shards = {p.name.removeprefix(CUTS).partition(".jsonl")[0] for p in manifests}
    for tar in sorted(p for name in fields for p in folder.glob(f"{name}.*.tar")):
        shard = tar.name.removesuffix(".tar")[tar.name.index(".") :]
        if shard not in shards:
            raise SettingsError(f"{folder / f'{CUTS}{shard}.jsonl.gz'}: no such file beside {tar}")
    for manifest in manifests:
        shard = manifest.name.removeprefix(CUTS).partition(".jsonl")[0]
        tars = [folder / f"{name}{shard}.tar" for name in fields]
        yield SharShard(
            cuts=manifest,
            tars=tuple(
                SharTar(tar) if tar.is_file() else SharTar(None, f"{tar}: no such file")
                for tar in tars
            ),
            values={name: _column(folder, name, shard) for name in sorted(columns)},
        )


def _is_lines(name: str) -> bool:
    return name.removesuffix(".gz").endswith(".jsonl") and not name.startswith(".")


def _column(folder: Path, name: str, shard: str) -> Path:
    """The file of a field in a shard, which must be there if other shards have it."""
    paths = [folder / f"{name}{shard}.jsonl{end}" for end in (".gz", "")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise SettingsError(f"{paths[0]}: no such file, and other shards have the field {name}")
    return local_file(found)


def _listed(shar: Mapping[str, Paths], fields: tuple[str, ...]) -> Iterator[SharShard]:
    """The shards of fields that are listed file by file."""
    files = {name: expand_shards(paths) for name, paths in shar.items()}
    columns = [
        name
        for name in files
        if name not in (CUTS, *fields) and all(_is_lines(Path(p).name) for p in files[name])
    ]
    for name in (CUTS, *(f for f in fields if f in files), *columns):
        if len(files[name]) != len(files[CUTS]):
            raise SettingsError(
                f"shar_path: {len(files[CUTS])} files of {CUTS} and {len(files[name])} of {name}; "
                "list one of each per shard"
            )
    cuts = local_files(files[CUTS])
    for number in range(len(cuts)):
        tars = (
            SharTar(packed_file(files[name][number]))
            if name in files
            else SharTar(None, f"shar_path: lists no {name}")
            for name in fields
        )
        yield SharShard(
            cuts=cuts[number],
            tars=tuple(tars),
            values={name: local_file(files[name][number]) for name in columns},
        )


def files_of_remote_folder(address: str, fields: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The files of each field in a remote folder of SHAR, shard by shard.

    Raises SettingsError for a folder that is no SHAR, or whose fields have other shards.
    """
    found: dict[str, list[str]] = {}
    for name in current().names(address):
        column = name.partition(".")[0]
        if _is_lines(name) or (column in fields and name.endswith(".tar")):
            found.setdefault(column, []).append(joined(address, name))
    if CUTS not in found:
        raise SettingsError(f"{address}: not a SHAR folder (no cuts.*.jsonl.gz in it)")
    return {column: tuple(names) for column, names in found.items()}
