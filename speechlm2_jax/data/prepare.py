"""From a configured data set to a planned one: tokenise, leave out, measure, plan.

What differs from one kind of data to another is behind two protocols, `DataKind` and `Contents`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Real

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.bucketing import Measures, Members, Shape, describe, plan_buckets
from speechlm2_jax.data.config import DataConfig, InputConfig, LoaderConfig
from speechlm2_jax.data.outliers import find_outliers
from speechlm2_jax.data.sampler import Sampler
from speechlm2_jax.data.sources import Source
from speechlm2_jax.settings import SettingsError

IDS_IN_LOG = 10
"""Conversations that are named in the log, of those that settings leave out for one cause."""

_FAR = "_far_too_many"
"""The end of a cause: seconds or tokens far beyond all else of the set."""
_log = logging.getLogger(__name__)


@runtime_checkable
class Contents(Protocol):
    """The conversations of one data set, and how they become arrays."""

    @property
    def conversations(self) -> Sequence[Any]:
        """In the order of their manifests; each has an `id`."""
        ...

    @property
    def measures(self) -> Measures:
        """Their lengths."""
        ...

    def tests(self) -> Mapping[str, Callable[[int], bool]]:
        """By cause: whether settings let the conversation of an index pass."""
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
        """What the table of the plan says of a shape, beside its rows and tokens."""
        ...

    def validation_error(self, planned: Sequence[int]) -> str | None:
        """Why a model must not be trained on an epoch of these conversations, if so."""
        ...

    def example(self, index: int) -> Any:
        """Reads a conversation's audio. Raises AudioError if any of it cannot be used."""
        ...

    def assemble(self, groups: Sequence[Sequence[Any]], shape: Any) -> Any:
        """The arrays of groups of examples; None is an empty row."""
        ...

    def reference(self, index: int, example: Any) -> Any:
        """What host-side validation metrics need of a conversation."""
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

    def contents(
        self, conversations: Sequence[Any], config: Any, frame_count: FrameCount, where: str
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


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A planned stream."""

    contents: Contents
    sampler: Sampler
    filtered: Mapping[str, int]
    """Conversations that settings leave out, by cause."""
    config: LoaderConfig

    @property
    def conversations(self) -> Sequence[Any]:
        """Those that are left."""
        return self.contents.conversations


def prepare(
    data_set: DataSet, dataset: DataKind, frame_count: FrameCount, groups: int, multiple: int
) -> Prepared:
    """Plans a data set, and logs the plan as a table.

    Raises SettingsError if its parts do not fit together, if nothing is left of the data, and if a
    training set is none that a model should learn from.
    """
    config, where = data_set.config, data_set.where
    everything = [c for source in data_set.sources for c in source.conversations]
    contents = dataset.contents(everything, config, frame_count, where)
    keep, dropped = kept(contents)
    dropped |= _outliers(data_set, contents, keep)
    filtered = {cause: len(ids) for cause, ids in dropped.items()}
    contents = contents.take(np.flatnonzero(keep))
    conversations = contents.conversations
    if not conversations:
        raise SettingsError(f"{where}: no conversation is left, of {filtered or 'none'}")
    sizes = _sizes(data_set, keep)
    _say_shares(data_set, sizes)
    sampler = _sampler(data_set, contents, sizes, groups, multiple)
    too_long = np.flatnonzero(sampler.plan.bucket_of < 0)
    if len(too_long):
        filtered["longer_than_buckets"] = len(too_long)
        dropped["longer_than_buckets"] = [conversations[i].id for i in too_long.tolist()]
    planned = [i for b in sampler.epoch(0) for group in b.groups for i in group]
    if not planned:
        raise SettingsError(f"{where}: no batch can be made of {len(conversations)} conversations")
    validation_error = contents.validation_error(planned) if data_set.is_train else None
    if validation_error is not None:
        raise SettingsError(f"{where}: {validation_error}")
    _report(where, describe(sampler.plan, contents.measures, contents.columns), dropped)
    return Prepared(contents=contents, sampler=sampler, filtered=filtered, config=config)


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
            _log.warning(
                "%s: far longer than all else, and kept by keep_outliers: every shape must hold %s",
                data_set.where,
                _listed(list(rows.values())),
            )
        return {}
    for rows in found.values():
        keep[list(rows)] = False
    return {f"{unit}{_FAR}": list(rows.values()) for unit, rows in found.items()}


def _sampler(
    data_set: DataSet, contents: Contents, sizes: tuple[int, ...], groups: int, multiple: int
) -> Sampler:
    config, sources = data_set.config, data_set.sources
    shares = tuple(s.share for s in sources if s.share is not None)
    seed = _seed(config.seed, data_set.where)
    is_train = data_set.is_train
    return Sampler(
        plan=plan_buckets(contents.measures, config, contents.shape, multiple),
        measures=contents.measures,
        sizes=sizes,
        shares=shares if shares and is_train else None,
        groups=groups,
        seed=seed,
        shuffle=config.shuffle,
        # NeMo fills buckets side by side whatever `shuffle` says
        by_bucket=config.shuffle or (is_train and config.use_bucketing),
        drop_last=config.drop_last,
        endless=is_train and (len(sources) > 1 or any(s.is_endless for s in sources)),
        shards=_shards(contents.conversations, sizes) if is_train else (),
        shard_seeds=tuple(seed if s.shard_seed is None else s.shard_seed for s in sources),
    )


def _shards(conversations: Sequence[Any], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Of each source, the conversations of each of its shards, in order."""
    numbers = np.asarray([one.shard for one in conversations], np.int64)
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    return tuple(tuple(np.unique(p, return_counts=True)[1].tolist()) for p in parts)


def _say_shares(data_set: DataSet, sizes: Sequence[int]) -> None:
    """Tells of sources without weights what share of an epoch each has."""
    if not data_set.is_train or len(sizes) < 2 or data_set.sources[0].share is not None:
        return
    named = zip((source.name for source in data_set.sources), sizes, strict=True)
    shares = [f"{name} {size / sum(sizes):.1%}" for name, size in named]
    _log.warning(
        "%s.input_cfg: %d sources without weights have the shares of their conversations: %s; "
        "NeMo gives them equal shares: for these set `weight: 1` on each entry",
        data_set.where,
        len(sizes),
        _listed(shares),
    )


def _sizes(data_set: DataSet, keep: np.ndarray) -> tuple[int, ...]:
    ends = np.cumsum([len(source.conversations) for source in data_set.sources])
    return tuple(int(part.sum()) for part in np.split(keep, ends[:-1]))


def _seed(seed: int | str, where: str) -> int:
    """A seed for every host; words that ask for a random one give a fixed one."""
    if isinstance(seed, int):
        return seed % (1 << 63)
    if seed not in ("trng", "randomized"):
        raise SettingsError(
            f"{where}.seed: expected an integer, 'trng' or 'randomized', got {seed!r}"
        )
    _log.info("%s.seed: %s would differ between hosts and runs; 0 is used", where, seed)
    return 0


def _report(where: str, table: str, dropped: Mapping[str, Sequence[str]]) -> None:
    _log.info("%s: the shapes of its batches, per group\n%s", where, table)
    for cause, ids in dropped.items():
        hint = "; keep_outliers: true keeps them" if cause.endswith(_FAR) else ""
        _log.warning("%s: %d left out by %s: %s%s", where, len(ids), cause, _listed(ids), hint)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:IDS_IN_LOG]) + (", ..." if len(names) > IDS_IN_LOG else "")
