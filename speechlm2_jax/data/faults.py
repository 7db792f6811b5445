"""Recordings that cannot be used: counted by cause and source, listed in a file, and limited."""

import json
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.settings import SettingsError, parse_json

LINES_PER_CAUSE = 10
"""Dropped conversations that are named in the log; further ones are only counted."""
RATE_WINDOW = 1000
"""`max_error_rate` is the share among so many conversations, the last ones that were read."""
RATE_LEAST = 100
"""It is looked at once so many were read."""
NOISE = "noise_path"
"""The source of faults that are no conversation's: those of noise and impulse responses."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A conversation, or a recording of noise, that could not be used when its turn came."""

    cause: str
    id: str
    index: int
    """Of the conversation in the data set, as ids may repeat; -1: of noise."""
    message: str
    source: str = ""
    """Its manifest."""
    path: str = ""
    """The file."""
    replaced_by: str | None = None
    """The id of the conversation that took its place in the batch."""

    @classmethod
    def of_noise(cls, error: AudioError) -> "Failure":
        """A recording of noise that cannot be used."""
        return cls(
            cause=error.cause,
            id=error.path or "?",
            index=-1,
            message=str(error),
            source=NOISE,
            path=error.path,
        )


@dataclass
class Dropped:
    """Conversations left out, counted by cause; the first of each cause are logged by id."""

    counts: dict[str, int] = field(default_factory=dict)
    count_each_once: bool = False
    """Whether a conversation met again, in a later pass, is the same one."""
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Source -> cause -> count, since the start of this process; noise too."""
    read: Counter[str] = field(default_factory=Counter)
    """Source -> conversations whose turn came."""
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(source, cause) -> rows of a stream that settings leave out, since the start."""
    _seen: set[tuple[int, str]] = field(default_factory=set)

    def add(self, failure: Failure) -> bool:
        """Counts one, unless it was counted before; whether it was counted."""
        name = (failure.index, failure.id)
        if self.count_each_once and name in self._seen:
            return False
        if self.count_each_once:
            self._seen.add(name)
        own = self.by_source.setdefault(failure.source, Counter())
        own[failure.cause] += 1
        count = own[failure.cause]
        if failure.source != NOISE:
            count = self.counts[failure.cause] = self.counts.get(failure.cause, 0) + 1
        what = "skipped noise" if failure.source == NOISE else "dropped"
        if count <= LINES_PER_CAUSE:
            _log.warning("%s %s: %s (%s)", what, failure.id, failure.cause, failure.message)
        if count == LINES_PER_CAUSE:
            _log.warning("further conversations dropped as %r are only counted", failure.cause)
        return True

    def leave_out(self, found: Sequence[tuple[str, str, str]]) -> None:
        """Counts what settings leave out of a stream, by source, cause and id.

        It is no fault: neither the limit nor the list of faults has it. The first of each cause and
        source is told, and the hundredth, the ten thousandth and so on.
        """
        for source, cause, name in found:
            self.counts[cause] = self.counts.get(cause, 0) + 1
            count = self.left_out[source, cause] = self.left_out[source, cause] + 1
            if count == 100 ** (len(str(count)) // 2):
                _log.warning("%s: %s left out by %s, as %s", source, _rows(count), cause, name)

    def table(self) -> str:
        """A line per source and cause, most faults first."""
        rows = [
            (source, cause, count)
            for source, causes in self.by_source.items()
            for cause, count in causes.items()
        ]
        lines: list[str] = []
        for source, cause, count in sorted(rows, key=lambda row: (-row[2], row[0], row[1])):
            read = self.read.get(source, 0)
            share = f" of {read} read ({count / read:.1%})" if read else ""
            lines.append(f"  {source}: {count} {cause}{share}")
        return "\n".join(lines)


@dataclass
class ErrorRate:
    """Stops a run whose data fail too often."""

    where: str
    """The data set, for the message."""
    limit: float | None
    """The largest share that may fail; None: any."""
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))

    def add(self, read: int, failed: int, dropped: Dropped) -> None:
        """Counts what was read. Raises SettingsError, with a table, above the limit."""
        if self.limit is None:
            return
        self._recent.extend([True] * failed + [False] * (read - failed))
        share = sum(self._recent) / max(len(self._recent), 1)
        if len(self._recent) >= RATE_LEAST and share > self.limit:
            raise SettingsError(
                f"{self.where}.max_error_rate: {share:.1%} of the last {len(self._recent)} "
                f"conversations could not be used, the limit is {self.limit:.1%}:\n"
                + dropped.table().replace("\n", ";\n")  # told apart where they are one line
            )


class ErrorLog:
    """A file with one JSON object per fault: where, what and why."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, data_set: str, place: tuple[int, int], failure: Failure) -> None:
        """Appends one of a batch, given by its epoch and number."""
        epoch, position = place
        row = {"set": data_set, "epoch": epoch, "position": position, **asdict(failure)}
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(row) + "\n")

    def drop_after(self, data_set: str, epoch: int, position: int) -> None:
        """Removes what a resumed run meets again, and a line that was cut off."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line + "\n" for line in lines if _is_before(line, data_set, (epoch, position))]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(self.path)


@dataclass(kw_only=True)
class Faults:
    """Those of one data set: counted, listed in a file if there is one, and limited."""

    name: str
    """Of the data set: `train_ds`, `validation_ds.NAME`."""
    rate: ErrorRate
    dropped: Dropped = field(default_factory=Dropped)
    log: ErrorLog | None = None

    def add(self, read: Counter[str], failures: Sequence[Failure], place: tuple[int, int]) -> None:
        """Takes those of a batch, by its epoch and number. Raises SettingsError above the limit."""
        self.dropped.read.update(read)
        for failure in failures:
            if self.dropped.add(failure) and self.log is not None:
                self.log.add(self.name, place, failure)
        failed = sum(failure.source != NOISE for failure in failures)
        self.rate.add(read.total(), failed, self.dropped)

    def resume(self, counts: Mapping[str, int], place: tuple[int, int]) -> None:
        """Continues counts that were saved at a place."""
        self.dropped.counts = dict(counts)
        if self.log is not None:
            self.log.drop_after(self.name, *place)


def _rows(count: int) -> str:
    return "a row is" if count == 1 else f"{count} rows are"


def _is_before(line: str, data_set: str, place: tuple[int, int]) -> bool:
    try:
        row: Any = parse_json(line)
    except SettingsError:
        return False
    return row["set"] == data_set and (row["epoch"], row["position"]) <= place
