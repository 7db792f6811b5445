"""Rows of shards, whose recordings are members of tars: NeMo's tarred data, and Lhotse SHAR."""

import functools
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import AnyConversation, Conversation
from speechlm2_jax.data.cuts import conversation_of_cut, cut_of_row
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.index.row_kinds import RowKind
from speechlm2_jax.data.index.rows import lines_of
from speechlm2_jax.data.index.texts import end_of_line, line_at
from speechlm2_jax.data.json_lines import is_gzip, object_of_line
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import (
    DIALOGS,
    NemoRow,
    check_has_speakers,
    conversation_of_row,
    conversations_of_rows,
)
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import Finder
from speechlm2_jax.data.shar import (
    RECORDING,
    PackedRecordings,
    SharCut,
    SharShard,
    SharTar,
    clip_of,
    cuts_of_shard,
)
from speechlm2_jax.data.share_gpt import share_gpt
from speechlm2_jax.data.spoken_dialogs import UnknownSpeakerError
from speechlm2_jax.data.storage.access import current, using
from speechlm2_jax.data.storage.downloads import shown
from speechlm2_jax.data.tar_headers import BLOCK_BYTES, size_of_member
from speechlm2_jax.data.tarred import Shard, dialogs_of_tar, in_tar_order
from speechlm2_jax.data.tars import TarRecordings
from speechlm2_jax.settings import SettingsError

_TEXTS_KEPT = 16
"""Decompressed manifests of shards."""


class PackedShard(NamedTuple):
    """A manifest, and the tars of its recordings; or a group of the rows of a table."""

    manifest: Path
    tars: tuple[str, ...]
    """One, or that of users and that of agents; empty where there is none. None of a table."""
    group: int = 0
    """Of a table: which group of rows."""
    text_bytes: int | None = None
    """Of its rows, about; None: as the manifest has."""

    @property
    def tar(self) -> str:
        """The first one."""
        return self.tars[0]


class PackedRow(NamedTuple):
    """A row of a shard."""

    offset: int
    """Of its line in the text of the manifest."""
    conversation: AnyConversation


Members = Sequence[AudioLocation | None]
"""The recordings of a row, in order; None: of no tar. Of a row with two tars: one of each."""


class RowsOfTars(Protocol):
    """Reads rows of shards: all of one, or one of them."""

    @property
    def shards(self) -> Sequence[PackedShard]:
        """The shards, in order."""
        ...

    @property
    def options(self) -> ManifestOptions:
        """How rows become conversations."""
        ...

    def rows(self, number: int) -> Iterator[PackedRow]:
        """Those of a shard, in the order of its recordings. Raises SettingsError."""
        ...

    def conversation(self, number: int, offset: int, members: Members) -> AnyConversation:
        """The row at an offset, whose recordings are members of the tars. Raises SettingsError."""
        ...


class TarredRows:
    """Rows of NeMo's tarred data: a manifest for each tar."""

    def __init__(
        self, shards: Sequence[PackedShard], options: ManifestOptions, kind: RowKind
    ) -> None:
        self.shards, self.options = shards, options

    def rows(self, number: int) -> Iterator[PackedRow]:
        """Those of a shard, in the order of its tar."""
        manifest, tar = self.shards[number].manifest, self.shards[number].tar
        check_has_speakers(str(manifest), self.options)
        named = {
            f"{shown(manifest)} line {n}": (offset, line) for n, offset, line in self._lines(number)
        }
        rows = [(where, object_of_line(where, line)) for where, (_, line) in named.items() if line]
        made = in_tar_order(Shard(tar, manifest, rows), skip_missing=self.options.skip_missing)
        for conversation in conversations_of_rows(made, self.options):
            yield PackedRow(named[conversation.where][0], conversation)

    def conversation(self, number: int, offset: int, members: Members) -> AnyConversation:
        """The row at an offset."""
        where = f"{self.shards[number].manifest} at byte {offset}"
        row = object_of_line(where, self._line_at(number, offset))
        member = members[0]
        if member is None:
            raise SettingsError(f"{where}: has no member of the tar")
        made = conversation_of_row(
            (where, lambda: NemoRow(row, lambda _: member, is_packed=True)), self.options
        )
        assert made is not None
        return made

    def _lines(self, number: int) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and text of each line of a shard; the text of a blank one is empty."""
        for n, (offset, line) in enumerate(_lines(self.shards[number].manifest), start=1):
            yield n, offset, line

    def _line_at(self, number: int, offset: int) -> bytes:
        return _line_at(self.shards[number].manifest, offset)


class SharRows:
    """Cuts of Lhotse SHAR."""

    def __init__(
        self, shards: Sequence[PackedShard], options: ManifestOptions, kind: RowKind
    ) -> None:
        self.shards, self.options = shards, options
        self._storage = current()
        self._duplex = kind.duplex
        self._fields = (RECORDING,) if kind.duplex is None else kind.duplex.fields

    def rows(self, number: int) -> Iterator[PackedRow]:
        """Those of a shard, in the order of its manifest."""
        manifest, tars = self.shards[number][:2]
        places = {
            f"{shown(manifest)} line {n}": place for n, (place, _) in enumerate(_lines(manifest), 1)
        }
        absence = f"{manifest}: no tar beside it"
        packed = tuple(SharTar(Path(tar) if tar else None, absence) for tar in tars)
        shard = SharShard(cuts=manifest, tars=packed, values={})
        for one in cuts_of_shard(shard, self._fields, number):
            if (made := self._conversation(one)) is not None:
                yield PackedRow(places[one.where], made)

    def conversation(self, number: int, offset: int, members: Members) -> AnyConversation:
        """The cut at an offset."""
        manifest, tars = self.shards[number][:2]
        where = f"{manifest} at byte {offset}"
        row = object_of_line(where, _line_at(manifest, offset))
        with located(where), using(self._storage):
            cut = cut_of_row(row, self._fields, Finder(manifest))
        packed = tuple(
            PackedRecordings(
                absence=f"{tar}: not in this tar",
                tar=tar,
                members={cut.id: [member.byte_range]} if member and member.byte_range else {},
            )
            for tar, member in zip(tars, members, strict=False)
        )
        one = SharCut(cut=cut, where=where, shard=number, packed=packed, number=0)
        with using(self._storage):
            made = self._conversation(one)
        if made is None:
            raise SettingsError(f"{where}: is left out")
        return made

    def _conversation(self, one: SharCut) -> AnyConversation | None:
        """A cut as a conversation; None for one that is left out, as of unknown speakers."""
        with located(one.where):
            if self._duplex is not None:
                return self._duplex.of_cut(one)
            clip = clip_of(one, self.options.channel)
            try:
                return conversation_of_cut(
                    one.cut, clip, self.options, where=one.where, shard=one.shard
                )
            except UnknownSpeakerError:
                return None


class DialogRows:
    """Dialogs whose recordings are in a tar, one for each manifest."""

    def __init__(
        self, shards: Sequence[PackedShard], options: ManifestOptions, kind: RowKind
    ) -> None:
        self.shards, self.options = shards, options
        self._form = share_gpt(kind.placeholders) if kind.placeholders else DIALOGS

    def rows(self, number: int) -> Iterator[PackedRow]:
        """Those of a shard, in the order of its manifest."""
        manifest, tar = self.shards[number].manifest, self.shards[number].tar
        lines = enumerate(_lines(manifest), start=1)
        places = {f"{shown(manifest)} line {n}": place for n, (place, _) in lines}
        made = dialogs_of_tar(
            manifest, TarRecordings(tar), self._form, skip_missing=self.options.skip_missing
        )
        for conversation in conversations_of_rows(made, self.options):
            yield PackedRow(places[conversation.where], conversation)

    def conversation(self, number: int, offset: int, members: Members) -> AnyConversation:
        """The dialog at an offset, whose recordings are in the order of its turns."""
        where, left = f"{self.shards[number].manifest} at byte {offset}", iter(members)
        row = object_of_line(where, _line_at(self.shards[number].manifest, offset))
        made = conversation_of_row(
            (where, lambda: self._form.row(row, lambda _: _next(left))), self.options
        )
        if made is None:
            raise SettingsError(f"{where}: is skipped")
        return made


def _next(members: Iterator[AudioLocation | None]) -> AudioLocation:
    if (member := next(members, None)) is None:
        raise SettingsError("has more recordings than when it was indexed")
    return member


def shard_bytes(shards: Sequence[PackedShard]) -> list[int]:
    """Bytes of the text of each shard, about, and one more, so that each has a place of its own.

    Shards of one manifest have equal parts of it.
    """
    shared = Counter(shard.manifest for shard in shards)
    sizes = {path: os.path.getsize(path) // count for path, count in shared.items()}
    return [
        (sizes[one.manifest] if one.text_bytes is None else one.text_bytes) + 1 for one in shards
    ]


def member_numbers(conversation: AnyConversation, tars: Sequence[str]) -> list[int]:
    """The 512-byte block of a tar at which each recording of a row begins; 0: of no tar.

    Of two voices: one for each tar.
    """
    if isinstance(conversation, DuplexConversation):
        ranges = {clip.path: clip.byte_range for clip in (conversation.source, conversation.target)}
        return [_block_of(ranges.get(tar)) for tar in tars]
    assert isinstance(conversation, Conversation)
    return [_block_of(clip.byte_range) for clip in conversation.clips]


def _block_of(byte_range: tuple[int, int] | None) -> int:
    return 0 if byte_range is None else byte_range[0] // BLOCK_BYTES


def member_at(tar: str, number: int) -> AudioLocation | None:
    """The member of a tar that begins at a block; None for block 0.

    Raises OSError or tarfile.ReadError if there is none.
    """
    if not number:
        return None
    with open(tar, "rb", buffering=0) as file:
        start = number * BLOCK_BYTES
        return AudioLocation(tar, (start, size_of_member(file.fileno(), start)))


def _lines(manifest: Path) -> Iterator[tuple[int, bytes]]:
    """The offset of each line in the text of a manifest, and the line; empty if it is blank."""
    for offset, line in lines_of(_text(manifest), 0):
        yield offset, line if line.removeprefix(b"\xef\xbb\xbf").strip() else b""


def _text(manifest: Path) -> bytes:
    try:
        data = manifest.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(f"{manifest}: damaged ({error})") from error


_kept_text = functools.lru_cache(_TEXTS_KEPT)(_text)
_is_gzip = functools.lru_cache(1 << 16)(is_gzip)


class _OpenedText(NamedTuple):
    """The text of an open file, which is closed after one line."""

    file: int
    size: int = 0

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.file, length, offset)


def _line_at(manifest: Path, offset: int) -> bytes:
    """The line that begins at an offset of a manifest's text."""
    if _is_gzip(manifest):
        text = _kept_text(manifest)
        return text[offset : end_of_line(text, offset)]
    with open(manifest, "rb", buffering=0) as file:
        return line_at(_OpenedText(file.fileno()), offset)
