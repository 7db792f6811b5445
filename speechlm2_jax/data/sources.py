"""From `input_cfg` to sources: the conversations of each manifest, and its share of the mixture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.contents import IndexedRows
from speechlm2_jax.data.input_config import (
    DEFAULT_TYPE,
    ENDLESS_TYPES,
    GROUP,
    PLAIN_TYPES,
    SOURCES,
    InputConfig,
    own_keys,
)
from speechlm2_jax.data.manifest_watch import manifest_files
from speechlm2_jax.data.paths import is_allowed_file, local_file
from speechlm2_jax.data.storage.access import using
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.streams.shards import StreamRows
from speechlm2_jax.settings import SettingsError, build, parse_yaml, read_text, resolve

C = TypeVar("C")
"""A conversation of one voice or of two."""
L = TypeVar("L", bound=LoaderConfig)


@dataclass(frozen=True, kw_only=True)
class Source(Generic[C]):
    """The conversations of one entry."""

    name: str
    conversations: Sequence[C]
    files: tuple[str, ...] = ()
    """Its manifests."""
    is_shar: bool = False
    is_endless: bool = False
    """Whether NeMo repeats it without end in training, batches running over from pass to pass."""
    shard_seed: int | None = None
    """Of the order of its shards; None: the data set's `seed`."""
    share: float | None = None
    """Its part of the mixture, all parts adding to 1; None where nothing is weighted, and every
    conversation counts the same."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An entry that is no group, with what it inherits."""

    config: InputConfig
    where: str
    share: float
    group_tags: Mapping[str, object]
    """Of the groups around it: fields of its conversations that, as in NeMo, are never turns."""


def read_sources(
    config: L,
    where: str,
    read: Callable[[InputConfig, L], Sequence[C]],
) -> list[Source[C]]:
    """Reads every manifest of a data set by `read`, which is given an entry and the settings.

    Raises SettingsError, naming the key, for a bad one.
    """
    with using(config.storage):
        return _read_sources(config, where, read)


def _read_sources(
    config: L, where: str, read: Callable[[InputConfig, L], Sequence[C]]
) -> list[Source[C]]:
    configs = _entries_of(config, where)
    entries = list(_flatten(configs, f"{where}.input_cfg", 1.0, _temperatures(config, configs), {}))
    is_weighted = any(_has_weight(c) for c in configs)
    return [_source(entry, config, read, is_weighted=is_weighted) for entry in entries]


def _source(
    entry: "_Entry",
    config: L,
    read: Callable[[InputConfig, L], Sequence[C]],
    *,
    is_weighted: bool,
) -> Source[C]:
    conversations = _read(entry, config, read)
    return Source(
        name=_name(entry.config),
        conversations=conversations,
        files=manifest_files(entry.config, is_stream=isinstance(conversations, StreamRows)),
        is_shar=entry.config.shar_path is not None,
        is_endless=_is_endless(entry.config),
        shard_seed=_shard_seed(entry.config, config),
        share=entry.share if is_weighted else None,
    )


def _entries_of(config: LoaderConfig, where: str) -> tuple[InputConfig, ...]:
    direct = {k: getattr(config, k) for k in ("cuts_path", "manifest_filepath", "shar_path")}
    given = {k: v for k, v in direct.items() if v is not None}
    if (config.input_cfg is not None) + len(given) != 1:
        raise SettingsError(
            f"{where}: give exactly one of input_cfg, cuts_path, manifest_filepath, shar_path"
        )
    if config.tarred_audio_filepaths is not None:
        given["tarred_audio_filepaths"] = config.tarred_audio_filepaths
        if config.input_cfg is not None:
            raise SettingsError(f"{where}.tarred_audio_filepaths: give it in the entry")
    if given:
        return (build(InputConfig, given, where),)
    entries = _listed(config.input_cfg or (), Path.cwd(), ())
    if not entries:
        raise SettingsError(f"{where}.input_cfg: the list is empty")
    return entries


def _listed(
    entries: str | tuple[InputConfig, ...], folder: Path, around: tuple[Path, ...]
) -> tuple[InputConfig, ...]:
    """The entries of a list, those of a group's file too.

    A relative path is looked up here, as in NeMo, then in the folder of the file that names it.
    """
    if isinstance(entries, str):
        beside = folder / entries
        is_here = is_remote(entries) or is_allowed_file(entries)
        is_beside = not is_here and is_allowed_file(beside)
        path = local_file(beside if is_beside else entries)
        if path.resolve() in around:
            raise SettingsError(f"{path}: input_cfg names itself; remove the entry")
        listed = _entries_of_file(path)
        return _listed(listed, path.parent, (*around, path.resolve()))
    return tuple(
        entry
        if entry.input_cfg is None
        else replace(entry, input_cfg=_listed(entry.input_cfg, folder, around))
        for entry in entries
    )


def _entries_of_file(path: Path) -> tuple[InputConfig, ...]:
    """The entries that a YAML file lists, its `${...}` resolved. Raises SettingsError."""
    text = read_text(path)
    try:
        listed = resolve(parse_yaml(text))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    if isinstance(listed, dict) and list(listed) == ["input_cfg"]:
        listed = listed["input_cfg"]
    if not isinstance(listed, list) or not listed:
        raise SettingsError(f"{path}: expected a list of entries, as input_cfg is")
    return tuple(build(InputConfig, e, f"{path}.{i}") for i, e in enumerate(listed))


def _flatten(
    configs: Sequence[InputConfig],
    where: str,
    share: float,
    temperatures: Sequence[float],
    tags: Mapping[str, object],
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
            place = f"{where}.{i}"
            entries += _parts(_Entry(config=config, where=place, share=part, group_tags=tags))
            continue
        place = f"{where}.{i}.input_cfg"
        inside = [_inherit(child, config) for child in _inside(config)]
        outer_first = tags
        if config.type == GROUP:
            outer_first = {**config.tags, **tags}
        else:
            inside = [_as_type_of(config, child, f"{place}.{n}") for n, child in enumerate(inside)]
        entries += _flatten(inside, place, part, temperatures[1:], outer_first)
    return entries


def _as_type_of(outer: InputConfig, child: InputConfig, where: str) -> InputConfig:
    """An entry inside one that is no group: read as the outer type, whose tags go before its own.

    As in NeMo, they are attached before the recording becomes a conversation, so a context opens
    the user's turn. Raises SettingsError for an entry of another type than recordings.
    """
    if child.type == "parquet" and outer.type == DEFAULT_TYPE:
        return replace(child, tags={**child.tags, **outer.tags})
    if child.type not in (GROUP, DEFAULT_TYPE, *PLAIN_TYPES):
        raise SettingsError(
            f"{where}.type: {child.type!r} cannot be read as {outer.type!r}; give one of "
            f"{', '.join(PLAIN_TYPES)}, or list it outside"
        )
    tags = {**child.tags, **outer.tags}
    own = {key: getattr(outer, key) for key in own_keys(outer.type)}
    if child.input_cfg is None:
        return replace(child, type=outer.type, tags=tags, **own)
    around = replace(outer, tags=tags)
    inside = tuple(
        _as_type_of(around, one, f"{where}.input_cfg.{n}") for n, one in enumerate(_inside(child))
    )
    return replace(child, tags={}, input_cfg=inside)


def _parts(entry: _Entry) -> list[_Entry]:
    """An entry, or one for each path with a weight of its own, which temperatures do not touch."""
    config = entry.config
    key = "shar_path" if config.shar_path is not None else "manifest_filepath"
    total = sum(weight for _, weight in config.weighted)
    if config.tarred_audio_filepaths is None:
        changes = [{key: path} for path, _ in config.weighted]
    else:
        changes = [
            {key: path, "tarred_audio_filepaths": tars}
            for (path, _), (_, tars) in zip(config.weighted, config.tarred, strict=False)
        ]
    return [
        replace(
            entry,
            config=replace(config, **change),
            share=entry.share * weight / total,
        )
        for change, (_, weight) in zip(changes, config.weighted, strict=True)
    ] or [entry]


def _inherit(child: InputConfig, group: InputConfig) -> InputConfig:
    """A group's settings hold for its entries; the nearer one wins."""
    names = (
        "audio_locator_tag",
        "token_equivalent_duration",
        "text_field",
        "shard_seed",
        "skip_missing_manifest_entries",
    )
    missing = {n: getattr(group, n) for n in names if getattr(child, n) is None}
    return replace(child, **missing)


def _has_weight(config: InputConfig) -> bool:
    given = config.weight is not None or bool(config.weighted)
    return given or any(_has_weight(c) for c in _inside(config))


def _depth(configs: Sequence[InputConfig]) -> int:
    return 1 + max((_depth(_inside(c)) for c in configs if c.input_cfg), default=0)


def _inside(config: InputConfig) -> tuple[InputConfig, ...]:
    return config.input_cfg if isinstance(config.input_cfg, tuple) else ()


def _temperatures(config: LoaderConfig, configs: Sequence[InputConfig]) -> list[float]:
    depth, given = _depth(configs), config.reweight_temperature
    if given is None or isinstance(given, int | float):
        return [1.0 if given is None else float(given)] * depth
    if len(given) != depth:
        raise SettingsError(
            f"reweight_temperature: {len(given)} values for {depth} levels of input_cfg"
        )
    return list(given)


def _is_endless(config: InputConfig) -> bool:
    """As NeMo repeats it: what is packed, texts, and mixtures."""
    is_packed = config.shar_path is not None or config.tarred_audio_filepaths is not None
    is_mixed = isinstance(config.manifest_filepath, tuple)
    return is_packed or is_mixed or config.type in ENDLESS_TYPES


def _shard_seed(entry: InputConfig, config: LoaderConfig) -> int | None:
    """The nearer integer; words ask for an order that differs from run to run."""
    given = config.shard_seed if entry.shard_seed is None else entry.shard_seed
    return given if isinstance(given, int) else None


def _name(config: InputConfig) -> str:
    path = next(found for key in SOURCES[config.type] if (found := getattr(config, key)))
    path = path["cuts"] if isinstance(path, Mapping) else path
    return str(path if isinstance(path, str) else (path or ("",))[0])


def _read(
    entry: _Entry,
    config: L,
    read: Callable[[InputConfig, L], Sequence[C]],
) -> Sequence[C]:
    try:
        conversations = read(entry.config, config)
    except SettingsError as error:
        raise SettingsError(f"{entry.where}: {error}") from error
    if isinstance(conversations, IndexedRows | StreamRows):
        tagged: Any = replace(conversations, fields=entry.group_tags)
        return tagged
    return (
        [_tagged(one, entry.group_tags) for one in conversations]
        if entry.group_tags
        else conversations
    )


def _tagged(conversation: Any, tags: Mapping[str, object]) -> Any:
    if not isinstance(conversation, Conversation):  # two voices have no fields
        return conversation
    return replace(conversation, fields={**conversation.fields, **tags})
