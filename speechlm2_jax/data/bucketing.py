"""Plans the few static shapes that a data set is cut into, from its lengths.

A bucket is a range of lengths with one shape. Lengths are measured in tokens as NeMo measures
conversations; the shape holds the true lengths of what is in the bucket, padded up.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from speechlm2_jax.batches import BatchShape, FrameCount
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.prompts import OUTPUT_ROLE

SURVEY_BUCKETS = 6
"""At most so many buckets where the settings name none."""
SURVEY_FILL = 0.85
"""Fewer of them if that much of each row is filled on average."""
SURVEY_LENGTHS = 512
"""Distinct lengths that the survey tells apart."""
SAMPLES_MULTIPLE_S = 0.08
"""Clip extents are multiples of it, so that data sets alike share compiled programs."""
CLIP_SPREAD = 2.0
"""Standard deviations of the clips in a group that its slots leave room for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Lengths of every conversation, index by index."""

    length: Int[np.ndarray, " N"]
    """Tokens as NeMo measures them: of the whole, or of the input if so configured."""
    steps: Int[np.ndarray, " N"]
    """LLM steps to train on: true expanded tokens less one."""
    clips: Int[np.ndarray, " N"]
    samples: Int[np.ndarray, " N"]
    """Of the longest clip, at the model's rate; 0 without audio."""

    def __len__(self) -> int:
        return len(self.length)

    def take(self, index: np.ndarray) -> "Measures":
        """The same of some conversations."""
        return Measures(
            length=self.length[index],
            steps=self.steps[index],
            clips=self.clips[index],
            samples=self.samples[index],
        )


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A range of lengths and its shape."""

    longest: int
    """Length of the longest conversation that it was planned for."""
    shape: BatchShape

    @property
    def name(self) -> str:
        """A name that says the whole shape: one compiled program each."""
        s = self.shape
        return f"rows{s.rows}_tokens{s.tokens}_clips{s.clips}_samples{s.samples}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The buckets of a data set, from short to long, and where each conversation belongs."""

    buckets: tuple[Bucket, ...]
    bucket_of: Int[np.ndarray, " N"]
    """-1: longer than every bucket that the settings name."""


def measure(
    conversations: Sequence[Conversation],
    *,
    frame_count: FrameCount,
    sample_rate_hz: int,
    measure_total_length: bool,
) -> Measures:
    """Measures conversations that have prompts."""
    samples = [[clip.samples(sample_rate_hz) for clip in c.clips] for c in conversations]
    frames = {n: frame_count(n) for n in {n for row in samples for n in row}}
    ids = [c.prompt.input_ids if c.prompt else np.zeros(0, np.int32) for c in conversations]
    steps = [
        len(i) - len(row) + sum(frames[n] for n in row) - 1
        for i, row in zip(ids, samples, strict=True)
    ]
    length = [
        c.lengths.total_tokens if measure_total_length else c.lengths.input_tokens
        for c in conversations
    ]
    return Measures(
        length=np.asarray(length, np.int64).reshape(-1),
        steps=np.asarray(steps, np.int64).reshape(-1),
        clips=np.asarray([len(row) for row in samples], np.int64).reshape(-1),
        samples=np.asarray([max(row, default=0) for row in samples], np.int64).reshape(-1),
    )


def kept(
    conversations: Sequence[Conversation],
    measures: Measures,
    config: DataLoaderConfig,
    placeholder_id: int,
) -> tuple[Bool[np.ndarray, " N"], dict[str, list[str]]]:
    """Which conversations the settings let pass, and the ids of the others by cause."""
    least_tokens, most_tokens = config.min_tokens or 0, config.max_tokens or math.inf
    least_s, most_s = config.min_duration or 0.0, config.max_duration or math.inf
    tests: dict[str, Callable[[Conversation, int], bool]] = {
        "no_answer": lambda c, n: c.turns[-1].role == OUTPUT_ROLE,
        "placeholders": lambda c, n: _placeholders(c, placeholder_id) == len(c.clips),
        "min_tokens": lambda c, n: n >= least_tokens,
        "max_tokens": lambda c, n: n <= most_tokens,
        "min_duration": lambda c, n: not c.clips or c.audio_duration_s >= least_s,
        "max_duration": lambda c, n: not c.clips or c.audio_duration_s <= most_s,
        "tokens_per_token": lambda c, n: _ratio_is_within(c, config.min_tpt, config.max_tpt),
    }
    keep, dropped = np.ones(len(conversations), bool), {}
    for i, (conversation, length) in enumerate(zip(conversations, measures.length, strict=True)):
        for cause, passes in tests.items():
            if not passes(conversation, int(length)):
                keep[i] = False
                dropped.setdefault(cause, []).append(conversation.id)
                break
    return keep, dropped


def plan_buckets(measures: Measures, config: DataLoaderConfig, pad_to_multiple: int = 8) -> Plan:
    """Plans the buckets of a data set.

    Rows are `bucket_batch_size`, or `batch_size`, or what `batch_tokens` leaves: never below
    floor(budget / longest of the bucket), nor below 1. Tokens are padded up to `pad_to_multiple`.
    A later bucket holds everything an earlier one does, so leftovers can move up.
    """
    edges = _edges(measures, config, pad_to_multiple)
    bucket_of = np.searchsorted(edges, measures.length, side="left")
    if config.bucket_batch_size is not None:
        bucket_of = np.where(bucket_of == len(edges), -1, bucket_of)
    present = sorted(set(bucket_of.tolist()) - {-1})
    unit = _unit(config.sample_rate)
    buckets: list[Bucket] = []
    for index in present:
        members = measures.take(np.flatnonzero(bucket_of == index))
        up_to = measures.take(np.flatnonzero((bucket_of >= 0) & (bucket_of <= index)))
        longest = int(members.length.max())
        rows = _rows(longest, index, config)
        shape = _shape(members, up_to, rows, unit, pad_to_multiple)
        buckets.append(Bucket(longest=longest, shape=shape))
    renumbered = {old: new for new, old in enumerate(present)} | {-1: -1}
    return Plan(
        buckets=tuple(buckets),
        bucket_of=np.asarray([renumbered[b] for b in bucket_of.tolist()], np.int64),
    )


def describe(plan: Plan, measures: Measures, sample_rate_hz: int) -> str:
    """The plan as a small table, a line per bucket."""
    lines = ["bucket  longest  rows  tokens  clips  seconds  conversations  filled"]
    for i, bucket in enumerate(plan.buckets):
        members, s = measures.take(np.flatnonzero(plan.bucket_of == i)), bucket.shape
        filled = members.steps.sum() / max(len(members) * s.tokens, 1)
        lines.append(
            f"{i:6d}  {bucket.longest:7d}  {s.rows:4d}  {s.tokens:6d}  {s.clips:5d}  "
            f"{s.samples / sample_rate_hz:7.2f}  {len(members):13d}  {filled:6.1%}"
        )
    return "\n".join(lines)


def _edges(measures: Measures, config: DataLoaderConfig, multiple: int) -> np.ndarray:
    """Upper ends of the buckets, rising; what is longer goes to one more bucket."""
    if config.bucket_duration_bins is not None:
        return np.asarray(config.bucket_duration_bins, np.float64)
    if config.use_bucketing:
        return _equal_mass_edges(measures.length, config.num_buckets)
    return _survey_edges(measures, config, multiple)


def _equal_mass_edges(length: np.ndarray, buckets: int) -> np.ndarray:
    """Edges that give every bucket about the same number of tokens, by Lhotse's rule."""
    edges, mass, per_bucket = [], 0.0, length.sum() / buckets
    for n in np.sort(length):
        if mass > per_bucket:
            edges.append(n)
            mass = 0.0
        mass += n
    return np.unique(np.asarray(edges, np.float64))


def _survey_edges(measures: Measures, config: DataLoaderConfig, multiple: int) -> np.ndarray:
    """Edges that leave the least padding: few, but enough to fill SURVEY_FILL of the shapes.

    What is padded is LLM steps and, in steps' worth, audio; both are paid for. Found exactly, by
    dynamic programming over the distinct lengths.
    """
    ends, count, needed = _survey(measures, config.sample_rate, multiple)
    if len(ends) < 2:
        return np.zeros(0)
    rows = _rows(int(measures.length.max()), 0, config)
    most = min(SURVEY_BUCKETS, len(ends), max(len(measures) // (2 * rows), 1))
    before = np.concatenate([[0], np.cumsum(count)])
    actual = (measures.steps + measures.samples / _unit(config.sample_rate)).sum()
    # cost[j]: the least that the j shortest lengths take in the buckets so far
    cost, cuts = before * np.concatenate([[0], needed]), []
    while cost[-1] * SURVEY_FILL > actual and len(cuts) + 1 < most:
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
    """Distinct lengths (rising), conversations of each, and what a row up to each one takes."""
    unit = _unit(sample_rate_hz)
    step = math.ceil(int(measures.length.max(initial=1)) / SURVEY_LENGTHS)
    ends, inverse = np.unique(-(-measures.length // step) * step, return_inverse=True)
    steps, samples = np.zeros(len(ends)), np.zeros(len(ends))
    np.maximum.at(steps, inverse, measures.steps)
    np.maximum.at(samples, inverse, measures.samples)
    tokens = np.ceil(np.maximum.accumulate(steps) / multiple) * multiple
    audio = np.ceil(np.maximum.accumulate(samples) / unit)
    return ends, np.bincount(inverse, minlength=len(ends)), tokens + audio


def _unit(sample_rate_hz: int) -> int:
    return max(round(SAMPLES_MULTIPLE_S * sample_rate_hz), 1)


def _rows(longest: int, index: int, config: DataLoaderConfig) -> int:
    if config.bucket_batch_size is not None:
        return config.bucket_batch_size[index]
    limits = [] if config.batch_size is None else [config.batch_size]
    if config.batch_tokens is not None:
        penalty = longest**2 / config.quadratic_factor if config.quadratic_factor else 0.0
        limits.append(int(config.batch_tokens // (longest + penalty)))
    return max(min(limits), 1)


def _shape(members: Measures, up_to: Measures, rows: int, unit: int, multiple: int) -> BatchShape:
    """The shape of a bucket that can also hold each conversation of the shorter ones."""
    spread = math.sqrt(rows) * float(members.clips.std())
    usual = math.ceil(rows * float(members.clips.mean()) + CLIP_SPREAD * spread)
    most = int(up_to.clips.max())
    return BatchShape(
        rows=rows,
        tokens=max(-(-int(up_to.steps.max()) // multiple), 1) * multiple,
        clips=max(min(rows * int(members.clips.max()), usual), most, 1),
        samples=max(-(-int(up_to.samples.max()) // unit), 1) * unit,
    )


def _placeholders(conversation: Conversation, placeholder_id: int) -> int:
    assert conversation.prompt is not None
    return int((conversation.prompt.input_ids == placeholder_id).sum())


def _ratio_is_within(conversation: Conversation, least: float, most: float) -> bool:
    prompt = conversation.prompt
    if prompt is None or prompt.answer_ids is None or (least <= 0 and most == math.inf):
        return True
    return least <= len(prompt.answer_ids) / max(len(prompt.context_ids), 1) <= most
