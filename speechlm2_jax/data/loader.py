"""Batches in a deterministic order: what reads and assembles them, and the stream of a run."""

import functools
import logging
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grain
import xxhash

from speechlm2_jax.batches import HostBatch
from speechlm2_jax.data.faults import Faults
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.data.index.windows import WindowSampler
from speechlm2_jax.data.manifest_watch import ManifestWatch
from speechlm2_jax.data.pipeline import Delivered, Plans, Read, Workers, pipeline, place_of
from speechlm2_jax.data.prepare import BatchContents
from speechlm2_jax.data.reading import ExampleReader, Key
from speechlm2_jax.data.sampler import BatchPlan, Sampler
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:  # it imports this module
    from speechlm2_jax.data.fused_reader import FusedReader

EMPTY_BATCHES = 20
"""Stop after so many consecutive batches without a usable recording."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Reads a planned batch and collates it into arrays."""

    examples: ExampleReader
    with_references: bool = False
    own_groups: frozenset[int] | None = None
    """Groups that this host reads; None: all. The others stay empty."""

    @property
    def contents(self) -> BatchContents:
        """The conversations."""
        return self.examples.contents

    @property
    def sampler(self) -> Sampler | WindowSampler:
        """What plans them."""
        return self.examples.sampler

    @functools.cached_property
    def fingerprint(self) -> int:
        """A number that changes with the data and the shapes it is planned into."""
        contents = self.contents
        ids = (
            contents.identity
            if isinstance(contents, IndexedContents)
            else "\0".join(c.id for c in contents.conversations)
        )
        sampler = self.sampler
        order = f"endless, shards by {sampler.shard_seeds}" if sampler.endless else ""
        return zlib.crc32((ids + str(sampler.plan.buckets) + order).encode("utf-8", "replace"))

    @functools.cached_property
    def contents_fingerprint(self) -> str:
        """A number, in hexadecimal, that changes with the texts and lengths behind the ids."""
        digest = xxhash.xxh3_64()
        if isinstance(self.contents, IndexedContents):
            return self.contents.identity
        for conversation in self.contents.conversations:
            digest.update(repr(_contents(conversation)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def groups(self) -> int:
        """Groups of a batch."""
        return self.sampler.groups

    def groups_read(self, planned: BatchPlan) -> Collection[int]:
        """The groups of a batch that are read here."""
        return range(len(planned.groups)) if self.own_groups is None else self.own_groups

    def load(self, planned: BatchPlan, key: Key) -> Read:
        """Reads a batch. A conversation that fails is replaced, else masked, so shapes stay.

        `key` is the epoch and the number of the batch.
        """
        bucket = self.sampler.plan.buckets[planned.bucket]
        own = self.groups_read(planned)
        reading = self.examples.read(planned, own, key)
        batch = HostBatch(
            arrays=self.contents.assemble(reading.examples, bucket.shape, planned.rows),
            ids=tuple(example.id for _, example in reading.usable),
            bucket=bucket.name,
            references=tuple(self.contents.reference(*pair) for pair in reading.usable)
            if self.with_references
            else (),
            share=len(own) / len(planned.groups),
        )
        return batch, reading


def _contents(conversation: Any) -> list[Any]:
    """The texts and durations of a conversation, without its paths."""
    found: list[Any] = [getattr(conversation, "duration_s", None)]
    for turn in conversation.turns:
        clip = getattr(turn, "clip", None)
        found.append(turn if clip is None else (turn.role, clip.offset_s, clip.duration_s))
    return found


class PlannedBatches(Iterator[BatchPlan]):
    """The batch plans of all epochs in order; its state is its position."""

    def __init__(self, sampler: Sampler, epochs: int | None = None) -> None:
        self._sampler, self._epochs = sampler, epochs
        self._epoch = self._position = 0
        self._left: list[int] = []
        self._plans: tuple[int, list[BatchPlan], list[int]] = (-1, [], [])

    def __next__(self) -> BatchPlan:
        while self._epochs is None or self._epoch < self._epochs:
            if self._plans[0] != self._epoch:
                self._plans = (self._epoch, *self._sampler.epoch_after(self._epoch, self._left))
            plans = self._plans[1]
            if self._position < len(plans):
                self._position += 1
                return plans[self._position - 1]
            if not plans and len(self._plans[2]) <= len(self._left):
                raise SettingsError("an epoch has no batches: fewer conversations than a batch")
            self._epoch, self._position, self._left = self._epoch + 1, 0, self._plans[2]
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        """The epoch, the batches of it that were given, and what the one before left to it."""
        left = {"left": list(self._left)} if self._left else {}
        return {"epoch": self._epoch, "position": self._position, **left}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a state of `get_state`."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        left = state.get("left", ()) if "window" not in state else ()  # that is of a large data set
        self._left = [int(index) for index in left]
        self._plans = (-1, [], [])


class BatchStream(grain.DatasetIterator[HostBatch]):
    """Batches in order, read ahead by Grain.

    Its state is small JSON and the same on every host. It is the state after the last returned
    batch, however far others are read: epoch, position, groups, a fingerprint of the data, and the
    dropped conversations.

    Args:
        make_plans: makes the plans of all batches, at their first one.
        reader: reads what they plan.
        faults: counts what cannot be read.
        workers: what reads ahead.
        watch: looks at the manifests.
    """

    def __init__(
        self,
        make_plans: Callable[[], Plans],
        reader: "BatchReader | FusedReader",
        faults: Faults,
        workers: Workers,
        watch: ManifestWatch | None = None,
    ) -> None:
        super().__init__()
        self._reader, self._faults, self._watch = reader, faults, watch
        self._make_plans, self._workers = make_plans, workers
        self._empty_batches = 0
        self._batches: grain.DatasetIterator[Delivered] | None = None
        self._begin(make_plans().get_state())

    def __next__(self) -> HostBatch:
        if self._batches is None:
            raise StopIteration
        delivered = next(self._batches)
        batch = delivered.batch
        if batch is None:
            self.close()
            raise StopIteration
        self._state = delivered.state
        self._faults.add(delivered.read, delivered.failures, delivered.place)
        if self._watch is not None:
            self._watch.look()
        # a process may own no row of a short validation batch, without any failure
        is_empty = not batch.ids and bool(delivered.failures)
        self._empty_batches = self._empty_batches + 1 if is_empty else 0
        if self._empty_batches >= EMPTY_BATCHES:
            raise SettingsError(
                f"{EMPTY_BATCHES} consecutive batches without a usable recording; the last one: "
                f"{delivered.failures[-1].message}"
            )
        return batch

    def get_state(self) -> dict[str, Any]:
        """Plain JSON values, as of the batch last returned."""
        return {
            **self._state,
            "groups": self._reader.groups,
            "data": self._reader.fingerprint,
            "contents": self._reader.contents_fingerprint,
            "dropped": dict(self._faults.dropped.counts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes after the batch that the state was taken at.

        Raises SettingsError for a state of batches with another number of groups.
        """
        groups = self._reader.groups
        if state["groups"] != groups:
            raise SettingsError(f"the data state has {state['groups']} groups, this run {groups}")
        if state["data"] != self._reader.fingerprint:
            _log.warning(
                "the data or its batch settings changed since this state was saved: the "
                "run resumes at the same position of a different order"
            )
        elif state.get("contents", own := self._reader.contents_fingerprint) != own:
            _log.warning(
                "the data changed since this state was saved: the ids are the same, texts or "
                "durations differ; the run resumes at the same position"
            )
        plans = self._make_plans()
        plans.set_state(state)
        self._stop()
        self._begin(plans.get_state())
        self._faults.resume(state["dropped"], place_of(self._state))

    def start_prefetch(self) -> None:
        """Begins to read ahead before the first batch is asked for."""
        if self._batches is not None:
            self._batches.start_prefetch()

    def close(self) -> None:
        """Stops reading ahead, and ends the processes that do."""
        self._stop()
        super().close()

    def _begin(self, state: dict[str, Any]) -> None:
        self._state = state
        self._batches = iter(pipeline(self._make_plans, state, self._reader, self._workers))

    def _stop(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()
