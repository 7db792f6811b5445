"""Rows of an index at other speeds, truncated or padded: lengths follow from its columns."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.data.augmentation.effects import changed_lengths
from speechlm2_jax.data.augmentation.variants import changed_by, speeds_of, variants
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.contents import IndexedRows
from speechlm2_jax.data.index.folders import digest
from speechlm2_jax.data.index.lengths import samples_of
from speechlm2_jax.data.index.salm import SalmPart

_CHANGED_BY = (
    "sample_rate",
    "truncate_duration",
    "truncate_offset_type",
    "pad_min_duration",
    "pad_direction",
)


def changed_rows(rows: IndexedRows, config: DataLoaderConfig) -> IndexedRows:
    """The rows of an entry as augmentation makes them: as often as there are speeds.

    As in a list, neighbours have different speeds.
    """
    if not changed_by(config):
        return rows
    speeds = speeds_of(config)
    changed = [
        ChangedRows(base=part, config=config, speeds=(*speeds[turn:], *speeds[:turn]))
        for turn in range(len(speeds))
        for part in rows.manifests
    ]
    return replace(rows, manifests=tuple(changed))


@dataclass(frozen=True, kw_only=True)
class ChangedRows:
    """The rows of a part, each changed (implements `SalmPart`)."""

    base: SalmPart
    config: DataLoaderConfig
    speeds: tuple[float, ...]
    """Of the rows in turn."""

    def __len__(self) -> int:
        return len(self.base)

    @property
    def identity(self) -> str:
        """Changes with the rows, and with how they are changed."""
        how = {name: getattr(self.config, name) for name in _CHANGED_BY}
        return digest([self.base.identity, self.speeds, how])

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the index of the rows may be."""
        return self.base.folders

    @property
    def locator_tags(self) -> frozenset[str]:
        """The tokens that stand for recordings."""
        return self.base.locator_tags

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token."""
        return self.base.token_equivalent_s

    @functools.cached_property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Those of the rows, with other durations, which are computed when they are read."""
        changed: Any = {"duration_s": _OfRows(self), "several_s": _OfSeveral(self)}
        return {**self.base.columns, **cast(Mapping[str, np.ndarray], changed)}

    def conversation(self, row: int) -> Conversation:
        """The conversation of a row that is not skipped."""
        speed = self.speeds[row % len(self.speeds)]
        (made,) = variants(
            self.base.conversation(row), self.config, self.config.sample_rate, [speed]
        )
        return made

    def changed(
        self, duration_s: Float[np.ndarray, " n"], rows: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Durations of recordings of some rows, as `variants` makes them."""
        config, rate = self.config, self.config.sample_rate
        speed = np.asarray(self.speeds)[rows % len(self.speeds)]
        played = changed_lengths(samples_of(duration_s, rate), speed) / rate
        seconds = np.where(speed == 1.0, duration_s, played)
        if config.truncate_duration:
            seconds = np.minimum(seconds, config.truncate_duration)
        return np.maximum(seconds, config.pad_min_duration or 0.0)


@dataclass(frozen=True)
class _OfSeveral:
    """The durations of recordings in rows that have several."""

    rows: ChangedRows

    def __getitem__(self, places: slice) -> Float[np.ndarray, " n"]:
        columns = self.rows.base.columns
        rows = np.asarray(columns["several"][places], np.int64)
        return self.rows.changed(np.asarray(columns["several_s"][places]), rows)


@dataclass(frozen=True)
class _OfRows:
    """The sums of the durations of each row's recordings."""

    rows: ChangedRows

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Float[np.ndarray, " n"]: ...
    def __getitem__(self, index: int | slice) -> float | Float[np.ndarray, " n"]:
        if not isinstance(index, slice):
            return float(self[index : index + 1][0])
        columns = self.rows.base.columns
        start, stop, _ = index.indices(len(self.rows))
        numbers = np.arange(start, stop)
        clips = np.asarray(columns["clips"][start:stop])
        seconds = self.rows.changed(np.asarray(columns["duration_s"][start:stop]), numbers)
        seconds = np.where(clips > 0, seconds, 0.0)
        several = columns["several"]
        begin, end = np.searchsorted(several, [start, stop])
        if begin < end:
            own = np.asarray(several[begin:end], np.int64) - start
            seconds[own] = 0.0
            # one after another, as the durations of a conversation are added
            np.add.at(seconds, own, self.rows.columns["several_s"][begin:end])
        return seconds

    def max(self, initial: float) -> float:
        """At least the longest."""
        config, base = self.rows.config, self.rows.base.columns["duration_s"]
        longest = float(base.max(initial=initial)) / min(self.rows.speeds) + 1 / config.sample_rate
        return max(longest, config.pad_min_duration or 0.0)
