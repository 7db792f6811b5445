"""Plans the few static shapes that a data set is batched into, from its lengths.

A bucket is a range of lengths with one shape. Lengths are measured as NeMo measures them, in tokens
or seconds; the shape holds the true lengths of what is in the bucket, padded up.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Real

from speechlm2_jax.data.config import LoaderConfig

SURVEY_BUCKETS = 6
"""At most so many buckets where the settings name none."""
SURVEY_FILL = 0.85
"""Fewer buckets if so much of each sequence is filled on average."""
SURVEY_LENGTHS = 512
"""Distinct lengths that are considered; longer data is rounded up."""
SAMPLES_MULTIPLE_S = 0.08
"""Clip lengths are padded to multiples of it, so that similar data sets share programs."""


@runtime_checkable
class Shape(Protocol):
    """The static shape of a bucket, per group (`BatchShape`, `DuplexShape`)."""

    @property
    def sequences(self) -> int:
        """Sequences of a group: one conversation each."""
        ...

    @property
    def tokens(self) -> int:
        """LLM positions of a sequence."""
        ...

    @property
    def clips(self) -> int:
        """Recordings of a group."""
        ...

    @property
    def name(self) -> str:
        """A unique name of the shape: one compiled program each."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Lengths of every conversation, index by index."""

    length: Real[np.ndarray, " N"]
    """As NeMo measures them: tokens of the whole or of the input, or seconds."""
    positions: Int[np.ndarray, " N"]
    """LLM positions that it takes, audio frames included."""
    clips: Int[np.ndarray, " N"]
    samples: Int[np.ndarray, " N"]
    """Of the longest clip, at the model's rate; 0 without audio, and for duplex data."""
    bins: Int[np.ndarray, " N"] | None = None
    """The 2-D bin, where settings have such bins; their number if none holds the conversation."""

    def __len__(self) -> int:
        return len(self.length)

    def take(self, index: np.ndarray) -> "Measures":
        """The same of some conversations."""
        return Measures(
            length=self.length[index],
            positions=self.positions[index],
            clips=self.clips[index],
            samples=self.samples[index],
            bins=None if self.bins is None else self.bins[index],
        )

    @property
    def bucketed(self) -> Real[np.ndarray, " N"]:
        """What the edges of buckets are compared with."""
        return self.length if self.bins is None else self.bins


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A range of lengths and its shape."""

    longest: int | float
    """Length of the longest conversation that it was planned for."""
    shape: Shape

    @property
    def name(self) -> str:
        """The shape's name."""
        return self.shape.name


@dataclass(frozen=True, kw_only=True)
class Members:
    """What a bucket is planned for: sums and maxima of its rows, and of those of shorter buckets.

    Leftovers of the shorter ones move up into it.
    """

    count: int
    longest: int | float
    """Length of its longest row."""
    filled: int
    """LLM positions of all its rows."""
    clips_mean: float
    clips_std: float
    most_clips: int
    """Recordings of one of its rows."""
    most_clips_up_to: int
    positions_up_to: int
    samples_up_to: int
    rows: int
    multiple: int
    """Positions are padded up to a multiple of it."""
    packed_clips: int | None = None
    """Recordings of a group of packed rows; None: of rows of one conversation each."""
    least_positions: int = 0
    """Of packed rows: positions that its conversations have at least."""
    most_positions: int | None = None
    """Of packed rows: those that they have at most."""

    @property
    def tokens(self) -> int:
        """Positions of the longest, padded up."""
        return max(-(-self.positions_up_to // self.multiple), 1) * self.multiple


ShapeOf = Callable[[Members], Shape]


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """The buckets of a data set, from short to long, and where each conversation belongs."""

    buckets: tuple[Bucket, ...]
    bucket_of: Int[np.ndarray, " N"]
    """-1: longer than every bucket that the settings name."""
    members: tuple[Members, ...] = ()
    """Of each bucket."""
    filled: tuple[float, ...] | None = None
    """Of each bucket of packed rows: the share of its LLM positions that is no padding."""


def plan_buckets(
    measures: Measures, config: LoaderConfig, shape_of: ShapeOf, pad_to_multiple: int = 8
) -> BucketPlan:
    """Plans the buckets of a data set, their shapes made by `shape_of`.

    The batch size is `bucket_batch_size`, or `batch_size`, or what fits the budget: never below
    floor(budget / longest of the bucket), nor below 1. Where batches follow the order of the data,
    and conversations are shorter on average, it is one more. Positions are padded up to
    `pad_to_multiple`. The shape of a longer bucket holds the conversations of a shorter one, so
    leftovers can move up.
    """
    edges = bucket_edges(measures, config, pad_to_multiple)
    bucket_of = np.searchsorted(edges, measures.bucketed, side="left")
    if config.bucket_batch_size is not None:
        bucket_of = np.where(bucket_of == len(edges), -1, bucket_of)
    present = sorted(set(bucket_of.tolist()) - {-1})
    members: list[Members] = []
    for index in present:
        own = measures.take(np.flatnonzero(bucket_of == index))
        up_to = measures.take(np.flatnonzero((bucket_of >= 0) & (bucket_of <= index)))
        longest = own.length.max().item()
        one = Members(
            count=len(own),
            longest=longest,
            filled=int(own.positions.sum()),
            clips_mean=float(own.clips.mean()),
            clips_std=float(own.clips.std()),
            most_clips=int(own.clips.max()),
            most_clips_up_to=int(up_to.clips.max()),
            positions_up_to=int(up_to.positions.max()),
            samples_up_to=int(up_to.samples.max()),
            rows=rows_of(longest, index, config, mean=float(up_to.length.mean())),
            multiple=pad_to_multiple,
        )
        members.append(one)
    renumbered = {old: new for new, old in enumerate(present)} | {-1: -1}
    return BucketPlan(
        buckets=tuple(Bucket(longest=m.longest, shape=shape_of(m)) for m in members),
        bucket_of=np.asarray([renumbered[b] for b in bucket_of.tolist()], np.int64),
        members=tuple(members),
    )


def describe(plan: BucketPlan, columns: Callable[[Shape], Mapping[str, str]]) -> str:
    """The plan as a small table, a line per bucket; `columns` adds columns for each shape."""
    rows: list[dict[str, str]] = []
    for i, (bucket, members) in enumerate(zip(plan.buckets, plan.members, strict=True)):
        if plan.filled is None:
            filled = members.filled / max(members.count * bucket.shape.tokens, 1)
        else:
            filled = plan.filled[i]
        rows.append(
            {
                "bucket": f"{i}",
                "longest": f"{round(bucket.longest, 2)}",
                "rows": f"{bucket.shape.sequences}",
                "tokens": f"{bucket.shape.tokens}",
                **columns(bucket.shape),
                "conversations": f"{members.count}",
                "filled": f"{filled:.1%}",
            }
        )
    widths = {name: max(len(row[name]) for row in [*rows, {name: name}]) for name in rows[0]}
    table = [dict(zip(widths, widths, strict=True)), *rows]
    return "\n".join("  ".join(row[name].rjust(widths[name]) for name in widths) for row in table)


def samples_unit(sample_rate_hz: int) -> int:
    """Samples that clip lengths are padded to multiples of."""
    return max(round(SAMPLES_MULTIPLE_S * sample_rate_hz), 1)


def bucket_edges(
    measures: Measures, config: LoaderConfig, multiple: int, *, least_padding: bool = False
) -> np.ndarray:
    """Upper ends of the buckets, rising; what is longer goes to one more bucket.

    `num_buckets` are those of Lhotse's rule, or (`least_padding`) those with the least padding.
    """
    if config.has_2d_bins:
        return np.arange(len(config.bucket_duration_bins or ()), dtype=np.float64)
    if config.bucket_duration_bins is not None:
        return np.asarray(config.bucket_duration_bins, np.float64)
    if not len(measures):
        return np.zeros(0)
    if config.use_bucketing and least_padding:
        return least_padding_edges(measures, config.sample_rate, multiple, config.num_buckets)
    if config.use_bucketing:
        return equal_mass_edges(measures.length, config.num_buckets)
    return _survey_edges(measures, config, multiple)


def beyond_bins(measures: Measures, config: LoaderConfig) -> Bool[np.ndarray, " N"]:
    """Which conversations settings leave out, as none of `bucket_duration_bins` holds them."""
    if config.bucket_batch_size is None or config.bucket_duration_bins is None:
        return np.zeros(len(measures), bool)
    bins = config.bucket_duration_bins
    return measures.bucketed > (len(bins) - 1 if config.has_2d_bins else bins[-1])


def equal_mass_edges(length: np.ndarray, buckets: int) -> np.ndarray:
    """Edges that give every bucket about the same sum of lengths, by Lhotse's rule."""
    edges, mass, per_bucket = [], 0.0, length.sum() / buckets
    for n in np.sort(length):
        if mass > per_bucket:
            edges.append(n)
            mass = 0.0
        mass += n
    return np.unique(np.asarray(edges, np.float64))


def _survey_edges(measures: Measures, config: LoaderConfig, multiple: int) -> np.ndarray:
    """Edges that leave the least padding: few, but enough to fill SURVEY_FILL of the shapes."""
    rows = rows_of(measures.length.max().item(), 0, config)
    most = min(SURVEY_BUCKETS, max(len(measures) // (2 * rows), 1))
    return least_padding_edges(measures, config.sample_rate, multiple, most, fill=SURVEY_FILL)


def least_padding_edges(
    measures: Measures, sample_rate_hz: int, multiple: int, most: int, fill: float = math.inf
) -> np.ndarray:
    """Edges of at most so many buckets that leave the least padding, or that fill `fill`.

    The cost of a shape is its LLM positions plus its audio in units of 80 ms. The minimum is found
    exactly, by dynamic programming over the distinct lengths.
    """
    ends, count, needed = _survey(measures, sample_rate_hz, multiple)
    if len(ends) < 2:
        return np.zeros(0)
    most = min(most, len(ends))
    before = np.concatenate([[0], np.cumsum(count)])
    actual = (measures.positions + measures.samples / samples_unit(sample_rate_hz)).sum()
    # cost[j]: the least that the j shortest lengths take in the buckets so far
    cost, cuts = before * np.concatenate([[0], needed]), []
    while len(cuts) + 1 < most and cost[-1] * fill > actual:
        options = cost[None, :-1] + needed[:, None] * (before[1:, None] - before[None, :-1])
        options[np.triu_indices(len(ends), 1)] = np.inf
        cuts.append(options.argmin(axis=1))
        cost = np.concatenate([[0.0], options.min(axis=1)])
    edges, end = [], len(ends)
    for choice in reversed(cuts):
        end = int(choice[end - 1])
        if not end:
            break
        edges.append(ends[end - 1])
    return np.asarray(edges[::-1], np.float64)


def _survey(
    measures: Measures, sample_rate_hz: int, multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct lengths (rising), conversations of each, and the cost of a sequence up to each."""
    unit = samples_unit(sample_rate_hz)
    step = math.ceil(measures.length.max(initial=1) / SURVEY_LENGTHS)
    ends, inverse = np.unique(-(-measures.length // step) * step, return_inverse=True)
    positions, samples = np.zeros(len(ends)), np.zeros(len(ends))
    np.maximum.at(positions, inverse, measures.positions)
    np.maximum.at(samples, inverse, measures.samples)
    tokens = np.ceil(np.maximum.accumulate(positions) / multiple) * multiple
    audio = np.ceil(np.maximum.accumulate(samples) / unit)
    return ends, np.bincount(inverse, minlength=len(ends)), tokens + audio


def rows_of(
    longest: int | float, index: int, config: LoaderConfig, *, mean: float | None = None
) -> int:
    """Sequences of the batches of a bucket: as many of its longest as fit, at least 1.

    One more where conversations of all lengths follow one another in a batch (`sums_budget`), and
    so many of the `mean` length fit.
    """
    if config.bucket_batch_size is not None:
        return config.bucket_batch_size[index]
    limits = [] if config.batch_size is None else [config.batch_size]
    if config.budget is not None:
        rows = max(int(config.budget // config.cost(longest)), 1)
        is_less = mean is not None and (rows + 1) * config.cost(mean) <= config.budget
        limits.append(rows + (config.sums_budget and is_less))
    return max(min(limits), 1)
