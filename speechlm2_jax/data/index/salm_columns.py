"""Lengths of the rows of a SALM's data, and which settings leave out, by whole columns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.data.bins import bin_of
from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.index.frame_table import FrameTable
from speechlm2_jax.data.index.lengths import LengthsOfRows, first_causes, samples_of
from speechlm2_jax.data.index.row_columns import (
    ENDS_IN_AUDIO,
    HAS_RESPONSE,
    NO_RESPONSE,
    WRONG_PLACEHOLDERS,
)

CAUSES = (
    "no_response",
    "placeholders",
    "min_tokens",
    "max_tokens",
    "min_duration",
    "max_duration",
    "tokens_per_token",
)
"""As in `SalmContents.tests`; the first that holds counts."""
_READ = ("duration_s", "clips", "flags", "tokens", "context", "prompt_flags")
"""Columns that lengths follow from."""


class Rows(Protocol):
    """Rows of one manifest, or of a list in memory."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Those of `row_columns`, but for the places of lines."""
        ...

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class SalmColumns:
    """Measures rows as `salm_contents.measure` measures conversations."""

    config: DataLoaderConfig
    frames: FrameTable
    has_audio: bool
    """Whether any row of the data set has a recording."""

    def measure(self, rows: Rows, start: int, stop: int) -> LengthsOfRows:
        """The rows from `start` to `stop`."""
        columns = _columns_of(rows, start, stop)
        rate, clips = self.config.sample_rate, columns["clips"].astype(np.int64)
        tokens, duration_s = columns["tokens"].astype(np.int64), columns["duration_s"]
        samples = samples_of(duration_s, rate)
        frames = np.where(clips > 0, self.frames(samples), 0)
        of = _Several.of(rows, start, stop)
        if of is not None:
            own = samples_of(of.durations_s, rate)
            samples[of.rows] = np.maximum.reduceat(own, of.first)
            frames[of.rows] = np.add.reduceat(self.frames(own), of.first)
        inputs, totals = _token_lengths(columns, rows.token_equivalent_s, of)
        measures = Measures(
            length=totals if self.config.measure_total_length else inputs,
            positions=tokens - clips + frames - 1,
            clips=clips,
            samples=samples,
            bins=bin_of(self.config, inputs, totals - inputs) if self.config.has_2d_bins else None,
        )
        return LengthsOfRows(
            measures=measures,
            causes=CAUSES,
            cause=self._causes(columns, measures.length),
            seconds=samples / rate,
            tokens=tokens,
        )

    def _causes(self, columns: Mapping[str, np.ndarray], length: np.ndarray) -> np.ndarray:
        config, flags = self.config, columns["prompt_flags"]
        is_left_out = {
            "no_response": flags & NO_RESPONSE > 0,
            "placeholders": (flags & WRONG_PLACEHOLDERS > 0) & self.has_audio,
        }
        if config.min_tokens:
            is_left_out["min_tokens"] = length < config.min_tokens
        if config.max_tokens:
            is_left_out["max_tokens"] = length > config.max_tokens
        has_clips, seconds = columns["clips"] > 0, columns["duration_s"]
        if config.min_duration:
            is_left_out["min_duration"] = has_clips & (seconds < config.min_duration)
        if config.max_duration:
            is_left_out["max_duration"] = has_clips & (seconds > config.max_duration)
        if config.min_tpt > 0 or config.largest_tpt != math.inf:
            ratio = (columns["tokens"] - columns["context"]) / np.maximum(columns["context"], 1)
            is_far = (ratio < config.min_tpt) | (ratio > config.largest_tpt)
            is_left_out["tokens_per_token"] = (flags & HAS_RESPONSE > 0) & is_far
        return first_causes(CAUSES, is_left_out, columns["flags"])


def token_lengths(
    rows: Rows, start: int, stop: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Tokens before the last turn, and of the whole, of rows; audio counts by its seconds."""
    columns, of = _columns_of(rows, start, stop), _Several.of(rows, start, stop)
    return _token_lengths(columns, rows.token_equivalent_s, of)


def _columns_of(rows: Rows, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(rows.columns[name][start:stop]) for name in _READ}


def _token_lengths(
    columns: Mapping[str, np.ndarray], token_equivalent_s: float | None, of: "_Several | None"
) -> tuple[np.ndarray, np.ndarray]:
    extra = _extra_tokens(columns["duration_s"], token_equivalent_s, columns["clips"])
    last = np.where(columns["prompt_flags"] & ENDS_IN_AUDIO, extra, 0)
    if of is not None:
        tokens_of = _extra_tokens(of.durations_s, token_equivalent_s, np.ones(len(of.durations_s)))
        extra[of.rows] = np.add.reduceat(tokens_of, of.first)
        is_last = columns["prompt_flags"][of.rows] & ENDS_IN_AUDIO
        last[of.rows] = np.where(is_last, tokens_of[of.last], 0)
    inputs = columns["context"].astype(np.int64) + extra - last
    return inputs, columns["tokens"].astype(np.int64) + extra


def longest_samples(rows: Sequence[Rows], rate_hz: int) -> int:
    """At least the samples of the longest recording."""
    most_s = max((float(one.columns["duration_s"].max(initial=0.0)) for one in rows), default=0.0)
    return int(samples_of(np.asarray([most_s]), rate_hz)[0])


def _extra_tokens(
    duration_s: np.ndarray, token_equivalent_s: float | None, clips: np.ndarray
) -> np.ndarray:
    """Tokens beyond their placeholders that recordings take."""
    if token_equivalent_s is None:
        return np.zeros(len(duration_s), np.int64)
    tokens = np.ceil(duration_s / token_equivalent_s).astype(np.int64) - 1
    return np.where(clips > 0, tokens, 0)


@dataclass(frozen=True, kw_only=True)
class _Several:
    """The rows of a stretch that have several recordings."""

    rows: Int[np.ndarray, " m"]
    """Counted from the start of the stretch."""
    durations_s: Float[np.ndarray, " clips"]
    """Of all their recordings."""
    first: Int[np.ndarray, " m"]
    """Each row's first recording among these."""

    @classmethod
    def of(cls, rows: Rows, start: int, stop: int) -> "_Several | None":
        several = rows.columns["several"]
        begin, end = np.searchsorted(several, [start, stop])
        if begin == end:
            return None
        numbers, first = np.unique(several[begin:end], return_index=True)
        durations_s = np.asarray(rows.columns["several_s"][begin:end])
        return cls(rows=numbers.astype(np.int64) - start, durations_s=durations_s, first=first)

    @property
    def last(self) -> Int[np.ndarray, " m"]:
        """Each row's last recording."""
        return np.append(self.first[1:], len(self.durations_s)) - 1
