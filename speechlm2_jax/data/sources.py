"""From `input_cfg` to sources: the conversations of each manifest, and its share of the mixture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechlm2_jax.data.config import InputConfig, LoaderConfig
from speechlm2_jax.data.readers import local_file
from speechlm2_jax.settings import SettingsError, build, parse_yaml


@dataclass(frozen=True, kw_only=True)
class Source:
    """The conversations of one entry."""

    name: str
    conversations: Sequence[Any]
    is_shar: bool = False
    share: float | None = None
    """Its part of the mixture, all parts adding to 1; None where nothing is weighted, and every
    conversation counts the same."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An entry that is no group, with what it inherits."""

    config: InputConfig
    where: str
    share: float


def read_sources(
    config: LoaderConfig, where: str, read: Callable[[InputConfig, Any], list[Any]]
) -> list[Source]:
    """Reads every manifest of a data set by `read`, which is given an entry and the settings.

    Raises SettingsError, naming the key, for a bad one.
    """
    configs = _entries_of(config, where)
    entries = list(_flatten(configs, f"{where}.input_cfg", 1.0, _temperatures(config, configs)))
    is_weighted = any(_has_weight(c) for c in configs)
    return [
        Source(
            name=_name(entry.config),
            conversations=_read(entry, config, read),
            is_shar=entry.config.shar_path is not None,
            share=entry.share if is_weighted else None,
        )
        for entry in entries
    ]


def _entries_of(config: LoaderConfig, where: str) -> tuple[InputConfig, ...]:
    direct = {k: getattr(config, k) for k in ("cuts_path", "manifest_filepath", "shar_path")}
    given = {k: v for k, v in direct.items() if v is not None}
    if (config.input_cfg is not None) + len(given) != 1:
        raise SettingsError(
            f"{where}: give exactly one of input_cfg, cuts_path, manifest_filepath, shar_path"
        )
    if given:
        return (build(InputConfig, given, where),)
    entries = config.input_cfg
    if isinstance(entries, str):
        listed = parse_yaml(local_file(entries).read_text(encoding="utf-8"))
        if not isinstance(listed, list):
            raise SettingsError(f"{entries}: expected a list of entries")
        entries = tuple(build(InputConfig, e, f"{entries}.{i}") for i, e in enumerate(listed))
    if not entries:
        raise SettingsError(f"{where}.input_cfg: the list is empty")
    return entries


def _flatten(
    configs: Sequence[InputConfig], where: str, share: float, temperatures: Sequence[float]
) -> list[_Entry]:
    """The entries below a level; its weights, raised to a temperature, share what it got."""
    given = [c.weight for c in configs if c.weight is not None]
    if given and len(given) != len(configs):
        raise SettingsError(f"{where}: give a weight to every entry or to none")
    weights = [w ** temperatures[0] for w in given] or [1.0] * len(configs)
    entries: list[_Entry] = []
    for i, (config, weight) in enumerate(zip(configs, weights, strict=True)):
        part = share * weight / sum(weights)
        if config.input_cfg is None:
            entries += _parts(_Entry(config=config, where=f"{where}.{i}", share=part))
        else:
            inside = [_inherit(child, config) for child in config.input_cfg]
            entries += _flatten(inside, f"{where}.{i}.input_cfg", part, temperatures[1:])
    return entries


def _parts(entry: _Entry) -> list[_Entry]:
    """An entry, or one for each SHAR folder with a weight; temperatures do not touch these."""
    folders = entry.config.weighted_shar
    total = sum(weight for _, weight in folders)
    return [
        replace(
            entry,
            config=replace(entry.config, shar_path=folder),
            share=entry.share * weight / total,
        )
        for folder, weight in folders
    ] or [entry]


def _inherit(child: InputConfig, group: InputConfig) -> InputConfig:
    """A group's settings hold for its entries; the nearer one wins."""
    names = ("audio_locator_tag", "token_equivalent_duration", "text_field")
    missing = {n: getattr(group, n) for n in names if getattr(child, n) is None}
    return replace(child, tags={**group.tags, **child.tags}, **missing)


def _has_weight(config: InputConfig) -> bool:
    given = config.weight is not None or bool(config.weighted_shar)
    return given or any(_has_weight(c) for c in config.input_cfg or ())


def _depth(configs: Sequence[InputConfig]) -> int:
    return 1 + max((_depth(c.input_cfg) for c in configs if c.input_cfg), default=0)


def _temperatures(config: LoaderConfig, configs: Sequence[InputConfig]) -> list[float]:
    depth, given = _depth(configs), config.reweight_temperature
    if given is None or isinstance(given, int | float):
        return [1.0 if given is None else float(given)] * depth
    if len(given) != depth:
        raise SettingsError(
            f"reweight_temperature: {len(given)} values for {depth} levels of input_cfg"
        )
    return list(given)


def _name(config: InputConfig) -> str:
    path = config.cuts_path or config.manifest_filepath or config.shar_path
    path = path["cuts"] if isinstance(path, Mapping) else path
    return str(path if isinstance(path, str) else Path(str((path or ("",))[0])))


def _read(
    entry: _Entry, config: LoaderConfig, read: Callable[[InputConfig, Any], list[Any]]
) -> list[Any]:
    try:
        return read(entry.config, config)
    except SettingsError as error:
        raise SettingsError(f"{entry.where}: {error}") from error
