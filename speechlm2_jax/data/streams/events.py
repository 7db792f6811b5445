"""Reads shards one after another: what each member of a tar gives, with the place to resume at."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.data.streams.feed import Feed, Sequential, members_before
from speechlm2_jax.data.streams.order import ShardOrder
from speechlm2_jax.data.streams.shards import PoolShard, ShardRow, ShardRows
from speechlm2_jax.data.tar_headers import TarMember, end_of_member, members_of
from speechlm2_jax.data.tars import check_plain, plain_name
from speechlm2_jax.settings import SettingsError

AT_END = -1
"""The place behind all members, where rows come whose member did not."""
MOST_LOST = 4
"""Shards in a row of which nothing can be read: then the storage counts as lost."""
_HEAD_BYTES = 8
_READ_ERRORS = (tarfile.TarError, SettingsError, OSError)
"""SettingsError: StorageError, and a compressed tar."""


class StreamPlace(NamedTuple):
    """Where reading resumes."""

    turn: int
    """Number of the shard, by `ShardOrder.unit`."""
    offset: int = 0
    """Of the member's first header in the tar."""
    taken: int = 0
    """Events of this member that came before."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row, or a member, that cannot be used."""

    cause: str
    id: str
    message: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """What came next of a shard."""

    what: Conversation | Fault
    place: StreamPlace
    """Where it came from."""
    source: str
    epoch: int


Variants = Callable[[Sequence[Conversation]], Sequence[Conversation]]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Shards that are read in one order, and how."""

    shards: Sequence[PoolShard]
    seed: int
    """Of their order."""
    is_shuffled: bool
    share: float
    """Of the examples."""
    storage: StorageAccess
    variants: Variants
    """The examples that augmentation makes of conversations."""

    def order(self, groups: int) -> ShardOrder:
        """Their order for so many groups."""
        return ShardOrder(
            shards=len(self.shards), groups=groups, seed=self.seed, shuffle=self.is_shuffled
        )


class PoolReader:
    """Reads the shards of a pool for one group."""

    def __init__(self, pool: Pool, order: ShardOrder) -> None:
        self.pool, self.order = pool, order
        self._feed: Feed | None = None

    def events(self, start: StreamPlace) -> Iterator[Event]:
        """All from a place on, without end.

        Raises SettingsError if a whole epoch has no example, and for storage that is lost.
        """
        place, useless, lost = start, 0, 0
        self.open_feed(start)
        try:
            while True:
                shard = _ShardReader(self, place)
                is_useful = False
                for event in shard.events():
                    is_useful |= isinstance(event.what, Conversation)
                    yield event
                lost = lost + 1 if shard.is_lost else 0
                if lost >= MOST_LOST:
                    raise SettingsError(f"{lost} shards in a row cannot be read: {shard.error}")
                useless = 0 if is_useful else useless + 1
                if useless > self.order.shards * self.order.parts:
                    reason = "" if shard.error is None else f": {shard.error}"
                    raise SettingsError(
                        f"{shard.shard.name}: no shard of the stream has an example that can be "
                        f"used{reason}"
                    )
                place = StreamPlace(place.turn + self.order.groups)
        finally:
            self.close()

    def open_feed(self, start: StreamPlace) -> None:
        """Begins to read ahead from a place on."""
        self.close()
        self._feed = Feed(self._files(start), self.pool.storage)

    def file_of(self, turn: int) -> Iterator[bytes]:
        """The blocks of the tar of a turn."""
        assert self._feed is not None
        return self._feed.file_of(turn)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._feed is not None:
            self._feed.close()

    def _files(self, place: StreamPlace) -> Iterator[tuple[int, str, int]]:
        while True:
            tar = self.pool.shards[self.order.unit(place.turn).shard].shard.tar
            if tar and place.offset != AT_END:
                yield place.turn, tar, place.offset
            place = StreamPlace(place.turn + self.order.groups)


class _ShardReader:
    """Reads one shard from a place on."""

    def __init__(self, reader: PoolReader, start: StreamPlace) -> None:
        self._reader, self._start = reader, start
        self._unit = reader.order.unit(start.turn)
        self._own = reader.pool.shards[self._unit.shard]
        self.shard = self._own.shard
        self.error: Exception | None = None
        """What ended it before its end."""
        self._recordings = 0

    @property
    def is_lost(self) -> bool:
        """Whether nothing of it could be read."""
        return self.error is not None and not self._recordings

    def events(self) -> Iterator[Event]:
        """What is left of it."""
        storage = self._reader.pool.storage
        try:
            with using(storage):
                rows = self.shard.rows()
        except SettingsError as error:
            self.error = error
            yield from self._without_rows(error)
            return
        taken = self._start.taken
        if self.shard.tar:
            self._pass_members(rows)
            for member_events, offset in self._members(rows):
                skipped = taken if offset == self._start.offset else 0
                yield from self._placed(member_events, offset, skipped)
        skipped = taken if self._start.offset == AT_END else 0
        yield from self._placed(self._left(rows), AT_END, skipped)

    def _placed(
        self, found: Sequence[Conversation | Fault], offset: int, skipped: int
    ) -> Iterator[Event]:
        for number, what in enumerate(found):
            if number >= skipped:
                place = StreamPlace(self._start.turn, offset, number)
                yield Event(what=what, place=place, source=self._own.source, epoch=self._unit.epoch)

    def _without_rows(self, error: SettingsError) -> Iterator[Event]:
        """One fault: how many rows are lost, nobody knows."""
        if self._unit.part == 0 and not self._start.taken:
            cause = error.cause if isinstance(error, StorageError) else "bad_row"
            name = self.shard.name
            fault = Fault(cause=cause, id=name, message=str(error), path=name)
            yield from self._placed([fault], 0, 0)

    def _blocks(self) -> Iterator[bytes]:
        """The blocks of its tar; a feed that hangs is replaced by one of the next shard."""
        try:
            yield from self._reader.file_of(self._start.turn)
        except StorageError as error:
            if error.cause == "timed_out":
                turn = self._start.turn + self._reader.order.groups
                self._reader.open_feed(StreamPlace(turn))
            raise

    def _pass_members(self, rows: ShardRows) -> None:
        """Counts the members before the start, whose rows came before."""
        offset = self._start.offset
        if not offset:
            return
        storage = self._reader.pool.storage
        try:
            for member in members_before(self.shard.tar, offset, storage):
                self._is_own(rows.of_member(member.name))
        except _READ_ERRORS as error:
            self.error = error if offset == AT_END else None

    def _members(self, rows: ShardRows) -> Iterator[tuple[list[Conversation | Fault], int]]:
        """What each member gives, and the offset of its first header."""
        place = self._start.offset
        if place == AT_END:
            return
        source = Sequential(self._blocks(), place)
        try:
            if not place:
                check_plain(self.shard.tar, source.read(_HEAD_BYTES, 0))
            for member in members_of(source.read, None, place):
                found = self._of_member(member, rows, source)
                yield found, place
                place = end_of_member(member)
        except _READ_ERRORS as error:
            self.error = error

    def _is_own(self, found: Sequence[ShardRow] | None) -> bool:
        """Whether this group reads the next member, which has these rows."""
        if found == []:  # no recording
            return False
        number, self._recordings = self._recordings, self._recordings + 1
        return number % self._reader.order.parts == self._unit.part

    def _of_member(
        self, member: TarMember, rows: ShardRows, source: Sequential
    ) -> list[Conversation | Fault]:
        found = rows.of_member(member.name)
        is_own = self._is_own(found)
        name = plain_name(member.name)
        if found is None:
            if self._own.skip_missing or not is_own:
                return []
            message = f"{name!r} has no row in {self.shard.name}"
            return [Fault(cause="no_row", id=name, message=message, path=self.shard.tar)]
        wanted = [row for row in found if is_own and not row.is_skipped]
        data = source.read(member.size, member.start) if wanted else b""
        if found and not source.reaches(member.start + member.size):
            for row in found:  # in each of the groups that share the tar
                rows.put_back(row)
            raise tarfile.ReadError(f"the file ends inside {name!r}")
        return [what for row in wanted for what in self._made(row, data, member)]

    def _made(
        self, row: ShardRow, data: bytes | None, member: TarMember | None
    ) -> Sequence[Conversation | Fault]:
        try:
            with using(self._reader.pool.storage):
                made = row.make(data, member)
        except SettingsError as error:
            cause = error.cause if isinstance(error, StorageError) else "bad_row"
            return [Fault(cause=cause, id=row.id, message=str(error), path=self.shard.name)]
        if self._own.fields:
            made = replace(made, fields={**made.fields, **self._own.fields})
        return self._reader.pool.variants([made])

    def _left(self, rows: ShardRows) -> list[Conversation | Fault]:
        """What is known of the rows whose member did not come."""
        found: list[Conversation | Fault] = []
        for row in rows.left():
            if row.number % self._reader.order.parts != self._unit.part:
                continue
            if row.is_unpacked:
                found += self._made(row, None, None)
            elif self.error is not None or not self._own.skip_missing:
                found.append(self._missing(row))
        return found

    def _missing(self, row: ShardRow) -> Fault:
        error, tar = self.error, self.shard.tar
        if error is None:
            message = f"{row.where}: {row.id!r} is not in {tar or 'any tar'}"
            return Fault(cause="missing", id=row.id, message=message, path=tar)
        cause = "truncated" if isinstance(error, tarfile.TarError) else "unreadable"
        if isinstance(error, FileNotFoundError):
            cause = "missing"
        if isinstance(error, StorageError):
            cause = error.cause
        return Fault(cause=cause, id=row.id, message=f"{tar}: {error}", path=tar)
