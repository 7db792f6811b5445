"""Makes events of a stream ready for batches, and reads their recordings."""

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm2_jax.data.augmentation.augmentation import Augmentation
from speechlm2_jax.data.bucketing import beyond_bins
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.faults import Failure
from speechlm2_jax.data.prepare import kept
from speechlm2_jax.data.streams.contents import contents_of
from speechlm2_jax.data.streams.events import Event, Fault
from speechlm2_jax.data.streams.group import ReadyEvent, StreamExample
from speechlm2_jax.data.streams.plan import StreamSampler
from speechlm2_jax.settings import SettingsError

TOO_LONG = "longer_than_buckets"


@dataclass(frozen=True, kw_only=True)
class StreamReader:
    """Makes events ready, reads examples and collates them."""

    dataset: Any
    contents: Any
    """Of the sample that shapes were planned by."""
    sampler: StreamSampler
    augmentation: Augmentation | None = None
    timeout_s: float | None = None

    @functools.cached_property
    def fingerprint(self) -> int:
        """A number that changes with the shards and the shapes."""
        sampler = self.sampler
        names = [[one.shard.name for one in pool.shards] for pool in sampler.pools]
        rest = (sampler.limits.tolist(), sampler.buffer_size, sampler.shuffle, sampler.schedule)
        shares = [(pool.share, pool.seed, pool.is_shuffled) for pool in sampler.pools]
        text = repr((names, shares, sampler.shapes, rest))
        return zlib.crc32(text.encode("utf-8", "replace"))

    @functools.cached_property
    def contents_fingerprint(self) -> str:
        """A text that changes with what the shards hold, and with settings that choose of it."""
        return contents_of(self.sampler.pools, self.contents.config)

    def ready(self, events: Sequence[Event]) -> list[ReadyEvent]:
        """Events with token ids and buckets; a row that no prompt can be made of is a fault."""
        chosen = [event for event in events if isinstance(event.what, Conversation)]
        found = iter(self._ready(chosen))
        return [
            next(found)
            if isinstance(event.what, Conversation)
            else ReadyEvent(event=event, what=event.what)
            for event in events
        ]

    def read(self, group: int, example: StreamExample) -> tuple[Any, list[Failure]]:
        """An example's audio, and the noise that could not be read. Raises AudioError."""
        noise: list[Failure] = []
        effects = None
        if self.augmentation is not None:
            key = (example.epoch, group, example.number)
            effects = self.augmentation.of_example(
                *key, report=lambda error: noise.append(Failure.of_noise(error))
            )
        rate_hz = self.contents.config.sample_rate
        return self.dataset.example(example.conversation, rate_hz, effects), noise

    def _ready(self, events: Sequence[Event]) -> Iterable[ReadyEvent]:
        conversations = [event.what for event in events]
        if not events:
            return []
        own = self.contents
        try:
            made = self.dataset.contents(
                conversations, own.config, own.frame_count, "data.train_ds"
            )
        except SettingsError as error:
            if len(events) > 1:
                return [ready for event in events for ready in self._ready([event])]
            name = str(getattr(conversations[0], "id", "?"))
            fault = Fault(cause="bad_row", id=name, message=str(error), path=events[0].source)
            return [ReadyEvent(event=events[0], what=fault)]
        keep, causes = kept(made)
        cause_of = {name: cause for cause, names in causes.items() for name in names}
        is_longer = keep & beyond_bins(made.measures, own.config)  # no fault: settings' own
        cause_of |= {made.conversations[n].id: TOO_LONG for n in np.flatnonzero(is_longer).tolist()}
        keep &= ~is_longer
        buckets = self.sampler.bucket_of(made.measures).tolist()
        clips = made.measures.clips.tolist()
        return [
            self._placed(event, made.conversations[n], buckets[n], clips[n])
            if keep[n]
            else ReadyEvent(event=event, what=None, left_out=cause_of[made.conversations[n].id])
            for n, event in enumerate(events)
        ]

    def _placed(
        self, event: Event, conversation: Conversation, bucket: int, clips: int
    ) -> ReadyEvent:
        if bucket >= 0:
            return ReadyEvent(event=event, what=conversation, bucket=bucket, clips=clips)
        message = f"{conversation.where}: longer than all shapes, which a sample was planned by"
        path = next((clip.path for clip in conversation.clips), "")
        fault = Fault(cause=TOO_LONG, id=conversation.id, message=message, path=path)
        return ReadyEvent(event=event, what=fault)
