"""The shards of an entry of `input_cfg`: their rows, and how these become conversations."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import AudioTurn, Conversation
from speechlm2_jax.data.cuts import conversation_of_cut
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import NemoRow, audio_name, check_has_speakers
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import expand_shards, local_file
from speechlm2_jax.data.shar import (
    NO_AUDIO,
    PLACEHOLDER,
    RECORDING,
    PackedRecordings,
    SharCut,
    SharShard,
    clip_of,
    cuts_with_values,
    shar_shards,
)
from speechlm2_jax.data.tar_headers import TarMember
from speechlm2_jax.data.tarred import SEGMENT, Row, pairs_of_shards, shards_of_one_manifest
from speechlm2_jax.data.tars import plain_name
from speechlm2_jax.settings import SettingsError

Make = Callable[[bytes | None, TarMember | None], Conversation]
"""A row as a conversation, whose recording is these bytes, a member of the tar. Raises
SettingsError for a row that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """A row of a shard."""

    id: str
    """Of its recording."""
    where: str
    make: Make
    number: int
    """In its shard."""
    is_skipped: bool = False
    """Whether it describes a member that is to be left out."""
    is_unpacked: bool = False
    """Whether its recording is a file of its own, or may be."""


class ShardRows(Protocol):
    """The rows of one shard, by the members of its tar."""

    def of_member(self, name: str) -> list[ShardRow] | None:
        """Those of the next member of a name; None if there are none, [] if it is no recording."""
        ...

    def put_back(self, row: ShardRow) -> None:
        """Takes a row back whose member did not come whole."""
        ...

    def left(self) -> list[ShardRow]:
        """Those whose member did not come, in order."""
        ...


class StreamShard(Protocol):
    """A tar, and what describes its members."""

    @property
    def tar(self) -> str:
        """Its path or address; empty: there is none."""
        ...

    @property
    def name(self) -> str:
        """Of its manifest."""
        ...

    @property
    def options(self) -> ManifestOptions:
        """How its rows become conversations."""
        ...

    @property
    def is_shuffled(self) -> bool:
        """Whether the order of shards of its kind is always drawn, as that of SHAR is."""
        ...

    def rows(self) -> ShardRows:
        """Its rows, read anew. Raises SettingsError."""
        ...


@dataclass(frozen=True, kw_only=True)
class TarredShard:
    """A tar of NeMo's, with its manifest or its part of one."""

    tar: str
    name: str
    options: ManifestOptions
    listed: Sequence[Row] | None = None
    """Its rows, of a manifest of several tars."""
    is_shuffled: bool = False

    def rows(self) -> "TarredShardRows":
        """The rows of its manifest. Raises SettingsError."""
        rows = self.listed
        if rows is None:
            rows = list(json_lines(local_file(self.name)))
        return TarredShardRows(self, rows)


class TarredShardRows:
    """Rows of NeMo's tarred data; segments of a member come in the order of their names."""

    def __init__(self, shard: TarredShard, rows: Sequence[Row]) -> None:
        self._shard = shard
        self._left: dict[int, ShardRow] = {}
        named: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for number, (where, row) in enumerate(rows):
            with located(where):
                audio = audio_name(row)
            named[plain_name(audio)].append((audio, number))
            match = SEGMENT.fullmatch(audio)
            if match is not None:
                whole = plain_name(match["stem"] + (match["suffix"] or ""))
                named[whole].append((audio, number))
            self._left[number] = ShardRow(
                id=audio,
                where=where,
                number=number,
                make=partial(self._conversation, where, row),
                is_skipped=bool(row.get("_skipme", False)),
            )
        self._named = {name: [n for _, n in sorted(found)] for name, found in named.items()}

    def of_member(self, name: str) -> list[ShardRow] | None:
        """The rows of a member and of its segments."""
        found = self._named.get(plain_name(name))
        if found is None:
            return None
        return [self._left.pop(number) for number in found if number in self._left]

    def put_back(self, row: ShardRow) -> None:
        """Takes a row back."""
        self._left[row.number] = row

    def left(self) -> list[ShardRow]:
        """Those whose member did not come."""
        return [row for _, row in sorted(self._left.items()) if not row.is_skipped]

    def _conversation(
        self, where: str, row: Mapping[str, Any], data: bytes | None, member: TarMember | None
    ) -> Conversation:
        assert member is not None
        location = AudioLocation(self._shard.tar, (member.start, member.size))
        with located(where):
            read = NemoRow(dict(row), lambda _: location, is_packed=True, trusts_duration=True)
            if read.unmeasured_files:
                raise SettingsError("a stream needs the duration of each row; add `duration`")
            made = read.conversation({}, self._shard.options, where)
        return with_bytes(made, data)


@dataclass(frozen=True, kw_only=True)
class SharStreamShard:
    """A shard of SHAR."""

    shard: SharShard
    number: int
    options: ManifestOptions
    is_shuffled: bool = True

    @property
    def tar(self) -> str:
        """The tar of its recordings."""
        return str(self.shard.tars[0].path or "")

    @property
    def name(self) -> str:
        """The file of its cuts."""
        return str(self.shard.cuts)

    def rows(self) -> "SharShardRows":
        """Its cuts. Raises SettingsError."""
        return SharShardRows(self)


class SharShardRows:
    """Cuts of a shard; of several with one id each takes a member of its own."""

    def __init__(self, shard: SharStreamShard) -> None:
        self._shard = shard
        self._left: dict[int, ShardRow] = {}
        self._named: defaultdict[str, deque[int]] = defaultdict(deque)
        for number, (where, cut) in enumerate(cuts_with_values(shard.shard, (RECORDING,))):
            self._named[cut.id].append(number)
            make = partial(self._conversation, where, cut)
            self._left[number] = ShardRow(
                id=cut.id,
                where=where,
                number=number,
                make=make,
                is_unpacked=not _is_placeholder(cut),
            )

    def of_member(self, name: str) -> list[ShardRow] | None:
        """The cut of a member."""
        stem, _, suffix = name.rpartition(".")
        if suffix in NO_AUDIO:
            return []
        waiting = self._named.get(stem)
        return [self._left.pop(waiting.popleft())] if waiting else None

    def put_back(self, row: ShardRow) -> None:
        """Takes a row back."""
        self._left[row.number] = row

    def left(self) -> list[ShardRow]:
        """Those whose member did not come."""
        return [row for _, row in sorted(self._left.items())]

    def _conversation(
        self, where: str, cut: Any, data: bytes | None, member: TarMember | None
    ) -> Conversation:
        own = self._shard
        packed = PackedRecordings(
            absence=f"{own.tar or own.name}: not in its tar",
            tar=own.tar,
            members={} if member is None else {cut.id: [(member.start, member.size)]},
        )
        one = SharCut(cut=cut, where=where, shard=own.number, packed=(packed,), number=0)
        with located(where):
            clip = clip_of(one, own.options.channel)
            made = conversation_of_cut(cut, clip, own.options, where=where, shard=own.number)
        return made if member is None else with_bytes(made, data)


def _is_placeholder(cut: Any) -> bool:
    recording = getattr(cut, "recording", None)
    return recording is None or any(one.type == PLACEHOLDER for one in recording.sources)


@dataclass(frozen=True, kw_only=True)
class PoolShard:
    """A shard, and what its entry adds."""

    shard: StreamShard
    source: str
    """The name of its entry."""
    skip_missing: bool = False
    fields: Mapping[str, object] = field(default_factory=dict)
    """Of the groups around the entry."""


@dataclass(frozen=True, kw_only=True)
class StreamRows(Sequence[Conversation]):
    """The shards of one entry: a sequence without elements, as these come one after another."""

    shards: tuple[StreamShard, ...]
    skip_missing: bool = False
    fields: Mapping[str, object] = field(default_factory=dict)
    """Of the groups around the entry, for all of its conversations."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        raise IndexError(index)


def is_packed(entry: InputConfig) -> bool:
    """Whether the recordings of an entry are members of tars, which can be read in order."""
    return entry.has_shards


def tars_of(entry: InputConfig) -> list[str]:
    """The tars of an entry; of SHAR its folders."""
    if entry.shar_path is None:
        return [tar for _, tars in entry.tarred for tar in expand_shards(tars)]
    if isinstance(entry.shar_path, Mapping):
        return expand_shards(entry.shar_path.get(RECORDING, ()))
    paths = (entry.shar_path,) if isinstance(entry.shar_path, str) else entry.shar_path
    return [one if isinstance(one, str) else one[0] for one in paths]


def stream_shards(entry: InputConfig, options: ManifestOptions) -> StreamRows:
    """The shards of an entry, which are not read yet. Raises SettingsError."""
    if entry.shar_path is not None:
        shards = shar_shards(entry.shar_path, (RECORDING,))
        return StreamRows(
            skip_missing=options.skip_missing,
            shards=tuple(
                SharStreamShard(shard=one, number=n, options=options)
                for n, one in enumerate(shards)
            ),
        )
    return StreamRows(
        skip_missing=options.skip_missing,
        shards=tuple(
            shard
            for manifests, tars in entry.tarred
            for shard in _tarred(expand_shards(manifests), expand_shards(tars), options)
        ),
    )


def _tarred(
    manifests: list[str], tars: list[str], options: ManifestOptions
) -> Iterator[TarredShard]:
    check_has_speakers(manifests[0], options)
    pairs = pairs_of_shards(manifests, tars)
    if pairs is not None:
        for manifest, tar in pairs:
            yield TarredShard(tar=tar, name=manifest, options=options)
        return
    path: Path = local_file(manifests[0])
    for shard in shards_of_one_manifest(path, tars):
        yield TarredShard(tar=shard.tar, name=manifests[0], options=options, listed=shard.rows)


def with_bytes(conversation: Conversation, data: bytes | None) -> Conversation:
    """The same, with the bytes of its recording."""
    turns = tuple(
        replace(turn, clip=replace(turn.clip, data=data)) if isinstance(turn, AudioTurn) else turn
        for turn in conversation.turns
    )
    return replace(conversation, turns=turns)
