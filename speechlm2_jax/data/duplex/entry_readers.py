"""From an entry of `input_cfg` to conversations of two voices, by its type."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.cuts import read_cuts
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.duplex.conversions import (
    TARGET,
    ContinuationOptions,
    Convert,
    OverlapOptions,
    ReverseOptions,
    continuation,
    continuation_fault,
    overlapping,
    reversed_roles,
    with_silent_agent,
)
from speechlm2_jax.data.duplex.readers import agent_clip, read_duplex_cuts, read_duplex_shar
from speechlm2_jax.data.entry_readers import recordings
from speechlm2_jax.data.input_config import (
    CONTINUATION,
    DUPLEX_TYPES,
    OVERLAP,
    REVERSE,
    TARRED_TO_DUPLEX,
    InputConfig,
)
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import expand_shards
from speechlm2_jax.data.shar import SharCut, shar_cuts
from speechlm2_jax.settings import SettingsError

_PLAIN = ("lhotse_as_conversation", "lhotse", "lhotse_shar")
_log = logging.getLogger(__name__)
Options = TypeVar("Options", OverlapOptions, ReverseOptions, ContinuationOptions)


def read_duplex_entry(
    entry: InputConfig, config: DuplexLoaderConfig
) -> Iterator[DuplexConversation]:
    """The conversations of an entry that is no group, in order. Raises SettingsError."""
    channel = config.channel_selector if isinstance(config.channel_selector, int) else None
    if entry.type == TARRED_TO_DUPLEX:
        yield from _with_silent_agents(entry, config, channel)
        return
    if entry.manifest_filepath is not None or entry.type not in (*_PLAIN, *DUPLEX_TYPES):
        raise SettingsError(
            "duplex data are Lhotse cuts with target_audio: give cuts_path or shar_path "
            f"(type: lhotse or lhotse_shar, or {', '.join(DUPLEX_TYPES)})"
        )
    if entry.type == CONTINUATION:
        yield from _continuations(entry, _options(ContinuationOptions, entry, _seed(entry, config)))
        return
    convert = _convert(entry)
    if entry.shar_path is not None:
        yield from read_duplex_shar(entry.shar_path, channel, convert)
        return
    for path in expand_shards(entry.manifests):
        yield from read_duplex_cuts(path, channel, convert)


def _convert(entry: InputConfig) -> Convert | None:
    if entry.type == OVERLAP:
        return overlapping(_options(OverlapOptions, entry))
    if entry.type == REVERSE:
        return reversed_roles(_options(ReverseOptions, entry))
    return None


def _options(cls: type[Options], entry: InputConfig, seed: int | None = None) -> Options:
    """The keys of a type, as far as the entry gives them."""
    given: dict[str, Any] = {f.name: getattr(entry, f.name, None) for f in fields(cls)}
    given["seed"] = seed
    return cls(**{name: value for name, value in given.items() if value is not None})


def _seed(entry: InputConfig, config: DuplexLoaderConfig) -> int:
    given = (entry.shard_seed, config.shard_seed, config.seed)
    return next((one for one in given if isinstance(one, int)), 0)


def _with_silent_agents(
    entry: InputConfig, config: DuplexLoaderConfig, channel: int | None
) -> Iterator[DuplexConversation]:
    options = ManifestOptions(
        text_field=entry.text_field or "text",
        channel=channel,
        skip_missing=entry.skip_missing_manifest_entries or config.skip_missing_manifest_entries,
    )
    silence_s = -0.08 if entry.agent_silence_duration is None else entry.agent_silence_duration
    for conversation in recordings(entry, options):
        with located(conversation.where):
            made = with_silent_agent(conversation, silence_s, config.sample_rate)
        yield made


def _continuations(
    entry: InputConfig, options: ContinuationOptions
) -> Iterator[DuplexConversation]:
    left_out: Counter[str] = Counter()
    for one in _synthesis_cuts(entry):
        with located(one.where):
            fault = continuation_fault(one.cut, options)
            if fault is not None:
                left_out[fault] += 1
                continue
            made = continuation(one.cut, _whole_agent(one), options)
        yield replace(made, where=one.where, shard=one.shard)
    if left_out:
        counts = ", ".join(f"{fault}: {count}" for fault, count in left_out.items())
        _log.warning("%s: cuts are left out by %s", entry.type, counts)


def _synthesis_cuts(entry: InputConfig) -> Iterator[SharCut]:
    if entry.shar_path is not None:
        yield from shar_cuts(entry.shar_path, (TARGET,))
        return
    for path in expand_shards(entry.manifests):
        for where, cut in read_cuts(path, fields=(TARGET,)):
            yield SharCut(cut=cut, where=where, shard=0, packed=(), number=0)


def _whole_agent(one: SharCut) -> AudioClip:
    """The whole of a cut's `target_audio`, packed or in a file."""
    clip = agent_clip(one)
    target = one.cut.custom[TARGET]
    return replace(clip, offset_s=0.0, duration_s=float(target.duration), is_segment=False)
