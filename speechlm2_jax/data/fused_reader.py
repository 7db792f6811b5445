"""Reads batches of fused sets: of one set, or of all, side by side in the groups of one batch."""

import functools
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.batches import HostBatch
from speechlm2_jax.data.bucketing import Shape
from speechlm2_jax.data.fused_plans import Fused
from speechlm2_jax.data.fusion import assembling, joined_shape
from speechlm2_jax.data.loader import BatchReader
from speechlm2_jax.data.pipeline import Read
from speechlm2_jax.data.reading import Key, Reading


@dataclass(frozen=True, kw_only=True)
class FusedReader:
    """Reads what FusedPlans plans, each set by its own reader."""

    parts: Mapping[str, BatchReader]

    @property
    def groups(self) -> int:
        """Groups of a batch, the same in all sets."""
        return next(iter(self.parts.values())).groups

    @functools.cached_property
    def fingerprint(self) -> int:
        """A number that changes with the data of any set, and the shapes they are planned into."""
        numbers = {name: part.fingerprint for name, part in self.parts.items()}
        return zlib.crc32(repr(numbers).encode())

    @functools.cached_property
    def contents_fingerprint(self) -> str:
        """A text that changes with the texts and lengths behind the ids."""
        return " ".join(part.contents_fingerprint for part in self.parts.values())

    def load(self, planned: Fused, key: Key) -> Read:
        """Reads a batch; the keys of its random draws are those of each set's own place."""
        if len(planned) == 1:
            (part,) = planned
            return self.parts[part.name].load(part.plan, part.place)
        return self._joined(planned)

    def _joined(self, planned: Fused) -> Read:
        readers = [self.parts[part.name] for part in planned]
        readings = [
            reader.examples.read(part.plan, reader.groups_read(part.plan), part.place)
            for reader, part in zip(readers, planned, strict=True)
        ]
        shapes = [
            reader.sampler.plan.buckets[part.plan.bucket].shape
            for reader, part in zip(readers, planned, strict=True)
        ]
        shape = joined_shape(shapes)
        groups = [sum(own, []) for own in zip(*(r.groups for r in readings), strict=True)]
        reading = Reading(
            groups=groups,
            failures=[failure for r in readings for failure in r.failures],
            read=sum((r.read for r in readings), Counter[str]()),
        )
        first = readers[0]
        contents = assembling([reader.contents for reader in readers])
        batch = HostBatch(
            arrays=contents.assemble(reading.examples, shape, _joined_rows(planned, shapes)),
            ids=tuple(example.id for _, example in reading.usable),
            bucket=shape.name,
            share=len(first.groups_read(planned[0].plan)) / len(groups),
        )
        return batch, reading


def _joined_rows(planned: Fused, shapes: Sequence[Shape]) -> list[list[int]] | None:
    """The row of each conversation of joined batches; None if no set is packed."""
    if all(part.plan.rows is None for part in planned):
        return None
    firsts = np.cumsum([0, *(shape.sequences for shape in shapes)]).tolist()
    rows: list[list[int]] = [[] for _ in planned[0].plan.groups]
    for part, first in zip(planned, firsts, strict=False):
        own = part.plan.rows or [range(len(group)) for group in part.plan.groups]
        for found, group in zip(rows, own, strict=True):
            found += [first + row for row in group]
    return rows
