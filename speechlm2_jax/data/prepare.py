"""Prepares a configured data set: tokenise, filter, measure, plan buckets.

SALM and duplex data implement two protocols, `DataKind` and `Contents`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Real

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.augmentation.augmentation import Augmentation, ExampleEffects
from speechlm2_jax.data.bucketing import Measures, Members, Shape, describe, plan_buckets
from speechlm2_jax.data.clip_room import with_room
from speechlm2_jax.data.config import DataConfig, LoaderConfig
from speechlm2_jax.data.conversations import AnyConversation
from speechlm2_jax.data.index.contents import IndexedRows, Part
from speechlm2_jax.data.index.order import Order
from speechlm2_jax.data.index.packed_windows import PackedWindowSampler
from speechlm2_jax.data.index.prepare import RowMeasures, index_data_set
from speechlm2_jax.data.index.windows import IN_ORDER_ROWS, WINDOW_ROWS, WindowSampler
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.outliers import FAR, find_outliers
from speechlm2_jax.data.packing import PackedSampler, packs, plan_packed
from speechlm2_jax.data.plan_report import report, warn_of_kept, warn_of_shares
from speechlm2_jax.data.sampler import Sampler
from speechlm2_jax.data.sources import Source
from speechlm2_jax.settings import SettingsError

_log = logging.getLogger(__name__)


class ConversationsOf(Protocol):
    """Conversations by their index."""

    def __getitem__(self, index: int, /) -> AnyConversation: ...
    def __len__(self) -> int: ...


@runtime_checkable
class BatchContents(Protocol):
    """The conversations of one data set, and how they become arrays."""

    @property
    def conversations(self) -> ConversationsOf:
        """In the order of their manifests; each has an `id`."""
        ...

    def name(self, index: int) -> str:
        """The id of a conversation, for messages."""
        ...

    def example(self, index: int, effects: ExampleEffects | None = None) -> Any:
        """Reads a conversation's audio. Raises AudioError if any of it cannot be used.

        `effects` are the random changes of its samples in one epoch.
        """
        ...

    def assemble(self, groups: Sequence[Sequence[Any]], shape: Any, rows: Any = None) -> Any:
        """The arrays of groups of examples; None is an empty sequence.

        `rows` are those of each example, if several share one.
        """
        ...

    def reference(self, index: int, example: Any) -> Any:
        """What host-side validation metrics need of a conversation."""
        ...


@runtime_checkable
class Contents(BatchContents, Protocol):
    """The same with all conversations in memory, and their lengths."""

    @property
    def conversations(self) -> Sequence[AnyConversation]:
        """In the order of their manifests; each has an `id`."""
        ...

    @property
    def measures(self) -> Measures:
        """Their lengths."""
        ...

    def tests(self) -> Mapping[str, Callable[[int], bool]]:
        """By cause: a test that the conversation of an index must pass to be kept."""
        ...

    def lengths(self) -> Mapping[str, Real[np.ndarray, " N"]]:
        """By unit, `seconds` or `tokens`: how long each conversation is, 0 without any."""
        ...

    def take(self, index: Int[np.ndarray, " n"]) -> "Contents":
        """The same of some conversations."""
        ...

    def shape(self, members: Members) -> Shape:
        """The shape of a bucket."""
        ...

    def columns(self, shape: Shape) -> Mapping[str, str]:
        """More columns of the plan's table for a shape, by name."""
        ...

    def validation_error(self, planned: Sequence[int]) -> str | None:
        """Why a model must not be trained on these conversations; None if it may."""
        ...


@runtime_checkable
class DataKind(Protocol):
    """A kind of data (`SALMDataset`, `DuplexS2SDataset`)."""

    @property
    def data_config(self) -> type[DataConfig]:
        """What reads the `data` block."""
        ...

    @property
    def loader_config(self) -> type[LoaderConfig]:
        """What reads the keys of one stream."""
        ...

    def check(self, config: Any, where: str) -> None:
        """Raises SettingsError if the `data` block contradicts the dataset."""
        ...

    def read(self, entry: InputConfig, config: Any) -> list[Any]:
        """The conversations of one entry of `input_cfg`. Raises SettingsError."""
        ...

    def index(self, entry: InputConfig, config: Any) -> Sequence[Any] | None:
        """The same of a large data set, read when they are asked for; None: `read` reads them."""
        ...

    def list_rows(self, conversations: Sequence[Any], config: Any, where: str) -> Part:
        """A list beside indexes, with its columns. Raises SettingsError as `contents`."""
        ...

    def row_measures(
        self, parts: Sequence[Any], config: Any, frame_count: FrameCount, where: str
    ) -> RowMeasures:
        """What measures the rows of a large data set. Raises SettingsError as `contents`."""
        ...

    def variants(self, conversations: Sequence[Any], config: Any) -> Sequence[Any]:
        """The examples that augmentation makes of conversations: at other speeds, in windows."""
        ...

    def contents(
        self,
        conversations: Sequence[Any],
        config: Any,
        frame_count: FrameCount,
        where: str,
    ) -> Contents:
        """Tokenises and measures. Raises SettingsError for what does not fit together."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One configured stream and the conversations of its manifests."""

    where: str
    """Its dotted path in the settings."""
    config: LoaderConfig
    sources: tuple[Source, ...]
    is_train: bool
    augmentation: Augmentation | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A planned stream."""

    contents: BatchContents
    sampler: Any
    """A Sampler, a WindowSampler of a large data set, or the StreamSampler of a stream."""
    filtered: Mapping[str, int]
    """Conversations that settings leave out, by cause."""
    config: LoaderConfig

    @property
    def conversations(self) -> ConversationsOf:
        """Those that are left."""
        return self.contents.conversations


def prepare(
    data_set: DataSet, dataset: DataKind, frame_count: FrameCount, groups: int, multiple: int
) -> Prepared:
    """Plans a data set, and logs the plan as a table.

    Raises SettingsError if the settings contradict each other, if no conversation is left, or if
    the training set has a `validation_error`.
    """
    config, where = data_set.config, data_set.where
    if any(isinstance(source.conversations, IndexedRows) for source in data_set.sources):
        return _prepare_indexed(data_set, dataset, frame_count, groups, multiple)
    everything = [c for source in data_set.sources for c in source.conversations]
    contents = dataset.contents(everything, config, frame_count, where)
    keep, dropped = kept(contents)
    dropped |= _outliers(data_set, contents, keep)
    if not keep.any():
        left_out = {cause: len(ids) for cause, ids in dropped.items()} or "none"
        raise SettingsError(f"{where}: no conversation is left; left out: {left_out}")
    left, sizes, sampler = _planned(data_set, contents, keep, groups, multiple)
    too_long = np.flatnonzero(keep)[sampler.plan.bucket_of < 0]
    if 0 < len(too_long) < len(left.conversations):  # shares are those of what is trained on
        dropped["longer_than_buckets"] = [contents.conversations[i].id for i in too_long.tolist()]
        keep[too_long] = False
        left, sizes, sampler = _planned(data_set, contents, keep, groups, multiple)
    if data_set.is_train:
        warn_of_shares(where, data_set.sources, sizes)
    contents, conversations = left, left.conversations
    filtered = {cause: len(ids) for cause, ids in dropped.items()}
    planned = [i for b in sampler.epoch(0) for group in b.groups for i in group]
    if not planned:
        raise SettingsError(f"{where}: no batch can be made of {len(conversations)} conversations")
    validation_error = contents.validation_error(planned) if data_set.is_train else None
    if validation_error is not None:
        raise SettingsError(f"{where}: {validation_error}")
    table = describe(sampler.plan, contents.columns)
    report(where, table, {cause: len(ids) for cause, ids in dropped.items()}, dropped)
    return Prepared(contents=contents, sampler=sampler, filtered=filtered, config=config)


def _planned(
    data_set: DataSet, contents: Contents, keep: np.ndarray, groups: int, multiple: int
) -> tuple[Contents, tuple[int, ...], Sampler]:
    """What is kept, the size of each source, and the plan."""
    contents = contents.take(np.flatnonzero(keep))
    sizes = _sizes(data_set, keep)
    return contents, sizes, _sampler(data_set, contents, sizes, groups, multiple)


def _prepare_indexed(
    data_set: DataSet, dataset: Any, frame_count: FrameCount, groups: int, multiple: int
) -> Prepared:
    """The same of a large data set, whose order is planned window by window."""
    config, where = data_set.config, data_set.where
    found = index_data_set(data_set, dataset, frame_count, multiple)
    dropped = dict(found.survey.dropped)
    if not sum(found.sizes):
        raise SettingsError(f"{where}: no conversation is left; left out: {dropped or 'none'}")
    if data_set.is_train:
        warn_of_shares(where, data_set.sources, found.sizes)
    order, is_packed = _ordering(data_set), packs(config)
    sampler = (PackedWindowSampler if is_packed else WindowSampler)(
        plan=found.plan,
        clips=found.clips,
        positions=found.positions,
        lengths=found.lengths,
        budget=None if found.lengths is None else config.budget,
        cost=config.cost,
        order=Order(
            sizes=found.sizes,
            shares=order.shares,
            seed=order.seed,
            shuffle=config.shuffle,
            is_mixed=order.endless and len(found.sizes) > 1,
            shards=found.shards if data_set.is_train else (),
            shard_seeds=order.shard_seeds,
            window_rows=WINDOW_ROWS if order.by_bucket and not is_packed else IN_ORDER_ROWS,
        ),
        groups=groups,
        by_bucket=order.by_bucket,
        drop_last=config.drop_last,
        endless=order.endless,
    )
    sampler = (
        sampler.with_fill() if isinstance(sampler, PackedWindowSampler) else with_room(sampler)
    )
    if data_set.is_train and (error := found.contents.validation_error(sampler.first_rows)):
        raise SettingsError(f"{where}: {error}")
    names = {cause: found.examples(cause) for cause in found.survey.examples}
    for cause in names.keys() - dropped.keys():
        warn_of_kept(where, names[cause])
    contents: Any = found.contents
    report(where, describe(sampler.plan, contents.columns), dropped, names)
    return Prepared(contents=contents, sampler=sampler, filtered=dropped, config=config)


def kept(contents: Contents) -> tuple[Bool[np.ndarray, " N"], dict[str, list[str]]]:
    """Which conversations the settings let pass, and the ids of the others by cause."""
    keep = np.ones(len(contents.conversations), bool)
    dropped: dict[str, list[str]] = {}
    tests = contents.tests()
    for i, conversation in enumerate(contents.conversations):
        for cause, passes in tests.items():
            if not passes(i):
                keep[i] = False
                dropped.setdefault(cause, []).append(conversation.id)
                break
    return keep, dropped


def _outliers(
    data_set: DataSet, contents: Contents, keep: Bool[np.ndarray, " N"]
) -> dict[str, list[str]]:
    """Takes what is far longer than all else out of `keep`; the names of such rows by cause.

    With `keep_outliers` they are kept, and only warned of.
    """
    found = find_outliers(contents.lengths(), keep, contents.conversations)
    if data_set.config.keep_outliers:
        for rows in found.values():
            warn_of_kept(data_set.where, list(rows.values()))
        return {}
    for rows in found.values():
        keep[list(rows)] = False
    return {f"{unit}{FAR}": list(rows.values()) for unit, rows in found.items()}


@dataclass(frozen=True, kw_only=True)
class _Ordering:
    """In which order a data set is gone through, by its settings."""

    shares: tuple[float, ...] | None
    seed: int
    by_bucket: bool
    endless: bool
    shard_seeds: tuple[int, ...]


def _ordering(data_set: DataSet) -> _Ordering:
    config, sources, is_train = data_set.config, data_set.sources, data_set.is_train
    shares = tuple(s.share for s in sources if s.share is not None)
    seed = seed_of(config, data_set.where)
    return _Ordering(
        shares=shares if shares and is_train else None,
        seed=seed,
        # NeMo fills buckets concurrently, with `shuffle` or without
        by_bucket=config.shuffle or (is_train and config.use_bucketing),
        endless=is_train and (len(sources) > 1 or any(s.is_endless for s in sources)),
        shard_seeds=tuple(seed if s.shard_seed is None else s.shard_seed for s in sources),
    )


def _sampler(
    data_set: DataSet, contents: Contents, sizes: tuple[int, ...], groups: int, multiple: int
) -> Sampler:
    config, order = data_set.config, _ordering(data_set)
    measures, sums = contents.measures, config.sums_budget and config.budget is not None
    if packs(config):
        plan, kind, sums = plan_packed(measures, config, multiple), PackedSampler, False
    else:
        plan, kind = plan_buckets(measures, config, contents.shape, multiple), Sampler
    sampler = kind(
        plan=plan,
        measures=measures,
        sizes=sizes,
        shares=order.shares,
        groups=groups,
        seed=order.seed,
        shuffle=config.shuffle,
        by_bucket=order.by_bucket,
        drop_last=config.drop_last,
        budget=config.budget if sums else None,
        costs=config.cost(measures.length) if sums else None,
        endless=order.endless,
        shards=_shards(contents.conversations, sizes) if data_set.is_train else (),
        shard_seeds=order.shard_seeds,
    )
    return sampler.with_fill() if isinstance(sampler, PackedSampler) else with_room(sampler)


def _shards(
    conversations: Sequence[AnyConversation], sizes: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Of each source, the conversations of each of its shards, in order."""
    numbers = np.asarray([one.shard for one in conversations], np.int64)
    by_source = np.split(numbers, np.cumsum(sizes)[:-1])
    return tuple(tuple(np.unique(s, return_counts=True)[1].tolist()) for s in by_source)


def _sizes(data_set: DataSet, keep: np.ndarray) -> tuple[int, ...]:
    ends = np.cumsum([len(source.conversations) for source in data_set.sources])
    return tuple(int(part.sum()) for part in np.split(keep, ends[:-1]))


def seed_of(config: LoaderConfig, where: str) -> int:
    """An integer seed, the same on every host; `trng` and `randomized` give 0.

    Raises SettingsError for another word.
    """
    seed = config.seed
    if isinstance(seed, int):
        return seed % (1 << 63)
    if seed not in ("trng", "randomized"):
        raise SettingsError(
            f"{where}.seed: expected an integer, 'trng' or 'randomized', got {seed!r}"
        )
    _log.info("%s.seed: %s would differ between hosts and runs; 0 is used", where, seed)
    return 0
