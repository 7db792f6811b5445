"""From a configured data set to a planned one: read, tokenise, leave out, measure, plan."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.bucketing import Measures, describe, kept, measure, plan_buckets
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioTurn, Conversation
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sampler import Sampler
from speechlm2_jax.data.sources import Source
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import SettingsError

IDS_IN_LOG = 10
"""Conversations that are named in the log, of those that settings leave out for one cause."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One configured stream and the conversations of its manifests."""

    where: str
    """Its dotted path in the settings."""
    config: DataLoaderConfig
    sources: tuple[Source, ...]
    is_train: bool


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A planned stream."""

    conversations: tuple[Conversation, ...]
    sampler: Sampler
    filtered: Mapping[str, int]
    """Conversations that settings leave out, by cause."""
    placeholder_id: int
    config: DataLoaderConfig


def prepare(
    data_set: DataSet, dataset: SALMDataset, frame_count: FrameCount, groups: int, multiple: int
) -> Prepared:
    """Plans a data set, and logs the plan as a table.

    Raises SettingsError if the prompt format or the audio tag does not suit the tokenizer, and if
    nothing is left of the data.
    """
    config, where = data_set.config, data_set.where
    if config.prompt_format is None:
        raise SettingsError(f"{where}.prompt_format: required (llama2, llama3, qwen, plain, ...)")
    placeholder_id = _placeholder_id(data_set, dataset.tokenizer)
    encoded = [dataset.encode(s.conversations, config.prompt_format) for s in data_set.sources]
    everything = [c for part in encoded for c in part]
    measures = _measure(everything, config, frame_count, where)
    keep, dropped = kept(everything, measures, config, placeholder_id)
    filtered = {cause: len(ids) for cause, ids in dropped.items()}
    conversations = tuple(c for c, is_kept in zip(everything, keep, strict=True) if is_kept)
    measures = measures.take(np.flatnonzero(keep))
    if not conversations:
        raise SettingsError(f"{where}: no conversation is left, of {filtered or 'none'}")
    sampler = _sampler(data_set, measures, _sizes(encoded, keep), groups, multiple)
    too_long = np.flatnonzero(sampler.plan.bucket_of < 0)
    if len(too_long):
        filtered["longer_than_buckets"] = len(too_long)
        dropped["longer_than_buckets"] = [conversations[i].id for i in too_long.tolist()]
    if not sampler.plan.buckets or not sampler.epoch(0):
        raise SettingsError(f"{where}: no batch can be made of {len(conversations)} conversations")
    _report(where, describe(sampler.plan, measures, config.sample_rate), dropped)
    return Prepared(
        conversations=conversations,
        sampler=sampler,
        filtered=filtered,
        placeholder_id=placeholder_id,
        config=config,
    )


def _measure(
    conversations: Sequence[Conversation],
    config: DataLoaderConfig,
    frame_count: FrameCount,
    where: str,
) -> Measures:
    try:
        return measure(
            conversations,
            frame_count=frame_count,
            sample_rate_hz=config.sample_rate,
            measure_total_length=config.measure_total_length,
        )
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from error


def _sampler(
    data_set: DataSet, measures: Measures, sizes: tuple[int, ...], groups: int, multiple: int
) -> Sampler:
    config = data_set.config
    shares = tuple(s.share for s in data_set.sources if s.share is not None)
    return Sampler(
        plan=plan_buckets(measures, config, multiple),
        measures=measures,
        sizes=sizes,
        shares=shares if shares and data_set.is_train else None,
        groups=groups,
        seed=_seed(config.seed, data_set.where),
        shuffle=config.shuffle,
        drop_last=config.drop_last,
    )


def _sizes(parts: Sequence[Sequence[Conversation]], keep: np.ndarray) -> tuple[int, ...]:
    ends = np.cumsum([len(part) for part in parts])
    return tuple(int(part.sum()) for part in np.split(keep, ends[:-1]))


def _placeholder_id(data_set: DataSet, tokenizer: Tokenizer) -> int:
    """The id that stands for audio; -1, which no text has, where there is no audio."""
    tags = {
        turn.locator_tag
        for source in data_set.sources
        for conversation in source.conversations
        for turn in conversation.turns
        if isinstance(turn, AudioTurn)
    }
    if len(tags) > 1:
        raise SettingsError(f"{data_set.where}: one audio_locator_tag, not {sorted(tags)}")
    for tag in tags:
        return tokenizer.require(tag, f"{data_set.where}: audio_locator_tag")
    return -1


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
        named = ", ".join(ids[:IDS_IN_LOG]) + (", ..." if len(ids) > IDS_IN_LOG else "")
        _log.warning("%s: %d left out by %s: %s", where, len(ids), cause, named)
