"""Training batches of a stream: each group fills the bucket of the step from its shuffle buffer."""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from dataclasses import dataclass
from typing import Any

import grain

from speechlm2_jax.batches import HostBatch
from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.faults import Failure, Faults
from speechlm2_jax.data.manifest_watch import ManifestWatch
from speechlm2_jax.data.read_ahead import read_ahead
from speechlm2_jax.data.streams.group import GroupStream, StreamExample
from speechlm2_jax.data.streams.reader import StreamReader
from speechlm2_jax.settings import SettingsError

EMPTY_BATCHES = 20
"""Stop after so many consecutive batches without a usable recording."""
WATCHED_ROWS, MOST_EMPTY = 10_000, 0.05
"""So many sequences are looked at together, and so large a share of them may be empty."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A batch, and what became of its examples."""

    batch: HostBatch
    failures: list[Failure]
    left_out: list[tuple[str, str, str]]
    """Source, cause and id of what settings leave out."""
    read: Counter[str]
    rows: int
    """Sequences of the batch that are read here."""
    groups: dict[str, Any]
    """The state of each group after it."""


class _Run:
    """The groups of this host from a state on; one thread makes batch after batch."""

    def __init__(
        self,
        reader: StreamReader,
        own: Sequence[int],
        threads: int,
        states: Mapping[str, dict[str, Any]] | None,
    ) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read_examples")
        self._groups = {
            group: GroupStream(
                reader.sampler, group, reader.ready, None if states is None else states[str(group)]
            )
            for group in own
        }
        self._is_replayed = False

    def close(self) -> None:
        """Stops all threads."""
        for group in self._groups.values():
            group.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def states(self) -> dict[str, Any]:
        """Of each group, as of the last batch."""
        return {str(group): stream.get_state() for group, stream in self._groups.items()}

    def step(self, step: int) -> _Step:
        """The batch of a step."""
        if not self._is_replayed:
            for stream in self._groups.values():
                stream.replay()
            self._is_replayed = True
        sampler = self._reader.sampler
        number = sampler.schedule.bucket(step)
        bucket = sampler.plan.buckets[number]
        failures, read = list[Failure](), Counter[str]()
        left_out: list[tuple[str, str, str]] = []
        chosen = {g: self._picked(g, number, [], read) for g in self._groups}
        groups: list[list[Any]] = [[] for _ in range(sampler.groups)]
        for group, examples in chosen.items():
            groups[group] = self._filled(group, number, examples, failures, read)
            failures += self._faults(group, read)
            left_out += self._groups[group].left_out
            self._groups[group].left_out.clear()
        self._look_ahead(step)
        batch = HostBatch(
            arrays=self._reader.contents.assemble(groups, bucket.shape),
            ids=tuple(example.id for group in groups for example in group),
            bucket=bucket.name,
            references=(),
            share=len(self._groups) / sampler.groups,
        )
        return _Step(
            batch=batch,
            failures=failures,
            left_out=left_out,
            read=read,
            rows=bucket.shape.sequences * len(self._groups),
            groups=self.states(),
        )

    def _picked(
        self, group: int, bucket: int, has: Sequence[StreamExample], read: Counter[str]
    ) -> list[StreamExample]:
        """Further examples for a batch, which are being read."""
        shape = self._reader.sampler.shapes[bucket]
        room = shape.clips - sum(one.clips for one in has)
        picked: list[StreamExample] = []
        while len(has) + len(picked) < shape.sequences:
            found = self._groups[group].next_example(bucket, room)
            if found is None:
                break
            room -= found.clips
            read[found.source] += 1
            self._start(group, found)
            picked.append(found)
        return picked

    def _filled(
        self,
        group: int,
        bucket: int,
        examples: list[StreamExample],
        failures: list[Failure],
        read: Counter[str],
    ) -> list[Any]:
        """The examples that can be used; in the place of the others come the next ones."""
        found: list[Any] = []
        usable: list[StreamExample] = []
        while examples:
            failed: list[tuple[StreamExample, AudioError]] = []
            for example in examples:
                try:
                    made, noise = self._result(example)
                except AudioError as error:
                    failed.append((example, error))
                    continue
                found.append(made)
                usable.append(example)
                failures += noise
            examples = self._picked(group, bucket, usable, read) if failed else []
            others = iter(examples)
            failures += [_failure(*one, next(others, None)) for one in failed]
        return found

    def _result(self, example: StreamExample) -> tuple[Any, list[Failure]]:
        assert example.future is not None
        limit_s = self._reader.timeout_s
        try:
            return example.future.result(limit_s)
        except LateError as error:
            message = f"not read within {limit_s:g} s (read_timeout)"
            raise AudioError(message, cause="timed_out") from error

    def _start(self, group: int, example: StreamExample) -> None:
        if example.future is None:
            read = functools.partial(self._reader.read, group, example)
            example.future = self._pool.submit(read)

    def _look_ahead(self, step: int) -> None:
        """Begins to read what the next step takes, as far as it is in the buffers."""
        sampler = self._reader.sampler
        bucket = sampler.schedule.bucket(step + 1)
        count = sampler.shapes[bucket].sequences
        for group, stream in self._groups.items():
            for example in stream.upcoming(bucket, count):
                self._start(group, example)

    def _faults(self, group: int, read: Counter[str]) -> list[Failure]:
        """Rows and members that could not be used, since the last step."""
        stream = self._groups[group]
        found: list[Failure] = []
        for event, fault, number in stream.faults:
            read[event.source] += 1
            found.append(
                Failure(
                    cause=fault.cause,
                    id=fault.id,
                    index=number,
                    message=fault.message,
                    source=event.source,
                    path=fault.path,
                )
            )
        stream.faults.clear()
        return found


def _failure(example: StreamExample, error: AudioError, other: StreamExample | None) -> Failure:
    return Failure(
        cause=error.cause,
        id=example.conversation.id,
        index=example.number,
        message=str(error),
        source=example.source,
        path=error.path,
        replaced_by=None if other is None else other.conversation.id,
    )


class StreamBatches(grain.DatasetIterator):
    """Training batches of a stream without end.

    Its state is plain JSON as of the batch last returned: the step, and for each group that this
    host reads the place of the oldest example in its buffer. `joined_state` joins those of hosts.
    """

    def __init__(
        self,
        reader: StreamReader,
        own: Iterable[int] | None,
        faults: Faults,
        threads: int,
        watch: ManifestWatch | None = None,
    ) -> None:
        super().__init__()
        groups = reader.sampler.groups
        self._own = sorted(range(groups) if own is None else own)
        self._reader, self._faults, self._threads = reader, faults, max(threads, 1)
        self._step, self._empty_batches, self._watch = 0, 0, watch
        self._rows = self._filled = 0
        self._begin(None)

    def __next__(self) -> HostBatch:
        _, future = next(self._reading)
        step = future.result()
        self._step += 1
        self._states = step.groups
        self._faults.add(step.read, step.failures, (0, self._step))
        self._faults.dropped.leave_out(step.left_out)
        self._watch_rows(len(step.batch.ids), step.rows)
        if self._watch is not None:
            self._watch.look()
        self._empty_batches = 0 if step.batch.ids else self._empty_batches + 1
        if self._empty_batches >= EMPTY_BATCHES:
            last = step.failures[-1].message if step.failures else "too few examples fit the bucket"
            raise SettingsError(
                f"{EMPTY_BATCHES} consecutive batches without a usable recording; the last one: "
                f"{last}"
            )
        return step.batch

    def _watch_rows(self, filled: int, rows: int) -> None:
        """Warns where many sequences are empty."""
        self._rows, self._filled = self._rows + rows, self._filled + filled
        if self._rows < WATCHED_ROWS:
            return
        share = 1 - self._filled / self._rows
        if share > MOST_EMPTY:
            _log.warning(
                "%.0f %% of the last %d sequences are empty: the lengths of the stream are not "
                "those of the sample that buckets are drawn by; raise num_cuts_for_bins_estimate "
                "or shuffle_buffer_size",
                *(100 * share, self._rows),
            )
        self._rows = self._filled = 0

    def get_state(self) -> dict[str, Any]:
        """Plain JSON values, as of the batch last returned."""
        return {
            "epoch": 0,
            "position": self._step,
            "groups": self._reader.sampler.groups,
            "data": self._reader.fingerprint,
            "contents": self._reader.contents_fingerprint,
            "dropped": dict(self._faults.dropped.counts),
            "streams": dict(self._states),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes after the batch that the state was taken at.

        Raises SettingsError for a state of other groups, or without the groups read here.
        """
        groups = self._reader.sampler.groups
        if state["groups"] != groups:
            raise SettingsError(f"the data state has {state['groups']} groups, this run {groups}")
        streams = state.get("streams", {})
        missing = [group for group in self._own if str(group) not in streams]
        if missing:
            raise SettingsError(
                f"the data state has no place of the groups {missing} in their shards: it is that "
                "of another kind of data, or of one host alone; start a new run"
            )
        if state["data"] != self._reader.fingerprint:
            _log.warning(
                "the shards or their batch settings changed since this state was saved: the run "
                "resumes in the same shards, with other batches"
            )
        elif state.get("contents") not in (None, "", self._reader.contents_fingerprint):
            _log.warning(
                "the rows, tars or settings of the stream changed since this state was saved: the "
                "run resumes at the same places of the same shards, with other examples"
            )
        self.close()
        self._step = int(state["position"])
        self._begin({str(group): streams[str(group)] for group in self._own})
        self._faults.resume(state["dropped"], (0, self._step))

    def joined_state(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state of all groups, of the states of the hosts that read them."""
        streams = {group: place for state in states for group, place in state["streams"].items()}
        return {
            **states[0],
            "streams": {group: streams[group] for group in sorted(streams, key=int)},
        }

    def close(self) -> None:
        """Stops reading ahead."""
        self._run.close()
        self._reading.close()
        super().close()

    def _begin(self, states: dict[str, dict[str, Any]] | None) -> None:
        self._run = _Run(self._reader, self._own, self._threads, states)
        self._states = self._run.states() if states is None else states
        self._reading = self._read_ahead(self._run.step)

    def _read_ahead(self, read: Callable[[int], _Step]) -> Generator[tuple[int, Future[_Step]]]:
        return read_ahead(itertools.count(self._step), read, ahead=2 * self._threads, threads=1)
