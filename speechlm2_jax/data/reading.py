"""Reads the examples of a planned batch, and others in the place of those that cannot be used."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.augmentation.augmentation import (
    Augmentation,
    ExampleEffects,
    Report,
    unreported,
)
from speechlm2_jax.data.bucketing import Shape
from speechlm2_jax.data.faults import Failure
from speechlm2_jax.data.index.windows import WindowSampler
from speechlm2_jax.data.prepare import BatchContents
from speechlm2_jax.data.sampler import BatchPlan, Sampler
from speechlm2_jax.data.time_limit import TimeLimit

REPLACEMENTS = 8
"""Conversations that are tried in the place of one that cannot be used."""
_DRAWS = 64
"""Random indices among which those of the right bucket are looked for."""
_PURPOSE = 2000
"""With the seed, tells these generators from those of plans and augmentation."""

Key = tuple[int, ...]
"""The epoch of a batch and its number: with the seed they decide what is drawn at random."""
Pair = tuple[int, Any]
"""The index of a conversation, and its example."""
Concatenate = Callable[[Sequence[Pair], Any, Callable[[int], ExampleEffects | None]], list[Pair]]
"""Of the examples of a group, the shape and the effects on an example: the joined ones."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What became of a planned batch."""

    groups: list[list[Pair | None]]
    """None: an empty sequence."""
    failures: list[Failure]
    read: Counter[str]
    """Source -> conversations whose turn came."""

    @property
    def examples(self) -> list[list[Any]]:
        """The examples of each group."""
        return [[None if pair is None else pair[1] for pair in group] for group in self.groups]

    @property
    def usable(self) -> list[Pair]:
        """Those that can be used, in order."""
        return [pair for group in self.groups for pair in group if pair is not None]


@dataclass(frozen=True, kw_only=True)
class ExampleReader:
    """Reads the examples of one data set."""

    contents: BatchContents
    sampler: Sampler | WindowSampler
    sources: Sequence[str] = ()
    """Their names."""
    augmentation: Augmentation | None = None
    replaces: bool = False
    """Whether another conversation takes the place of one that fails: in training."""
    limit: TimeLimit = field(default_factory=TimeLimit)
    concatenate: Concatenate | None = None
    """Makes fewer and longer examples of those of a group."""

    def read(self, planned: BatchPlan, own: Collection[int], key: Key) -> Reading:
        """Reads the groups `own` of a batch. Raises SettingsError for storage that is lost."""
        places = [(g, p) for g in sorted(own) for p in range(len(planned.groups[g]))]
        outcomes = self._read_all([planned.groups[g][p] for g, p in places], key)
        groups: list[list[Pair | None]] = [[None] * len(group) for group in planned.groups]
        for (group, place), outcome in zip(places, outcomes, strict=True):
            groups[group][place] = outcome.pair
        failures: list[Failure] = []
        for (group, place), outcome in zip(places, outcomes, strict=True):
            failures += outcome.noise
            if outcome.error is None:
                continue
            other = self._replacement(planned, group, groups[group], outcome.index, key)
            groups[group][place] = other and other.pair
            failures += [self._failure(outcome.index, outcome.error, other)]
            failures += other.noise if other else []
        if self.concatenate is not None:
            shape = self.sampler.plan.buckets[planned.bucket].shape
            groups = [self._concatenated(group, shape, key) for group in groups]
        read = Counter(self._source(outcome.index)[0] for outcome in outcomes)
        return Reading(groups=groups, failures=failures, read=read)

    def _concatenated(
        self, group: Sequence[Pair | None], shape: Shape, key: Key
    ) -> list[Pair | None]:
        assert self.concatenate is not None
        pairs = [pair for pair in group if pair is not None]
        joined = self.concatenate(pairs, shape, lambda index: self._effects(index, key))
        return [*joined, *[None] * (len(group) - len(joined))]

    def _effects(self, index: int, key: Key, report: Report = unreported) -> ExampleEffects | None:
        own = self.augmentation
        return None if own is None else own.of_example(*key, index, report=report)

    def _read_all(self, indices: Sequence[int], key: Key) -> list["_Outcome"]:
        return self.limit.read_all(
            indices,
            functools.partial(self._read, key=key),
            self._late,
            self.contents.name,
        )

    def _read(self, index: int, key: Key) -> "_Outcome":
        outcome = _Outcome(index=index)
        effects = self._effects(index, key, lambda e: outcome.noise.append(Failure.of_noise(e)))
        if effects is not None and self.concatenate is not None:
            effects = effects.before_joining()
        try:
            outcome.example = self.contents.example(index, effects)
        except AudioError as error:
            outcome.error = error
        return outcome

    def _late(self, index: int) -> "_Outcome":
        message = f"not read within {self.limit.seconds:g} s (read_timeout)"
        return _Outcome(index=index, error=AudioError(message, cause="timed_out"))

    def _replacement(
        self, planned: BatchPlan, group: int, pairs: Sequence[Pair | None], index: int, key: Key
    ) -> "_Outcome | None":
        """Another conversation that can be used; None if there is none at hand."""
        if not self.replaces:
            return None
        rng = np.random.default_rng([self.sampler.seed, _PURPOSE, *key, group, index])
        # not of the other groups' replacements: another host may not read them
        taken = {i for one in planned.groups for i in one} | {p[0] for p in pairs if p is not None}
        room = self.sampler.plan.buckets[planned.bucket].shape.clips
        clips = self.sampler.clips_of
        room -= sum(clips(pair[0]) for pair in pairs if pair is not None)
        fitting = (
            candidate
            for candidate in self._candidates(planned.bucket, index, rng)
            if candidate not in taken
            and clips(candidate) <= room
            and self.sampler.can_replace(candidate, index)
        )
        for candidate in itertools.islice(fitting, REPLACEMENTS):
            taken.add(candidate)
            outcome = self._read_all([candidate], key)[0]
            if outcome.error is None:
                return outcome
        return None

    def _candidates(self, bucket: int, index: int, rng: np.random.Generator) -> Iterator[int]:
        """Random conversations of a bucket: of the same source, then of any; then shorter ones."""
        bucket_of, total = self.sampler.plan.bucket_of, sum(self.sampler.sizes)
        _, first, size = self._source(index)
        for shortest in (bucket, 0):
            for start, count in ((first, size), (0, total)):
                for candidate in (start + rng.integers(count, size=_DRAWS)).tolist():
                    if shortest <= bucket_of[candidate] <= bucket:
                        yield candidate

    def _source(self, index: int) -> tuple[str, int, int]:
        """The name of a conversation's source, its first index, and its size."""
        ends = self._ends
        number = int(np.searchsorted(ends, index, side="right"))
        size = self.sampler.sizes[number]
        name = self.sources[number] if self.sources else ""
        return name, int(ends[number]) - size, size

    @functools.cached_property
    def _ends(self) -> Int[np.ndarray, " sources"]:
        return np.cumsum(self.sampler.sizes)

    def _failure(self, index: int, error: AudioError, other: "_Outcome | None") -> Failure:
        return Failure(
            cause=error.cause,
            id=self.contents.name(index),
            index=index,
            message=str(error),
            source=self._source(index)[0],
            path=error.path,
            replaced_by=self.contents.name(other.index) if other else None,
        )


@dataclass(kw_only=True)
class _Outcome:
    """What reading one conversation gave."""

    index: int
    example: Any = None
    error: AudioError | None = None
    """Why it cannot be used."""
    noise: list[Failure] = field(default_factory=list)
    """Noise and impulse responses that could not be read."""

    @property
    def pair(self) -> Pair | None:
        return None if self.error is not None else (self.index, self.example)
