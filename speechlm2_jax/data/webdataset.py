"""Folders of tars in WebDataset's form: a JSON and a recording of one name are one example."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import Find, ManifestRow, conversations_of_rows
from speechlm2_jax.data.manifest_values import located, shown
from speechlm2_jax.data.paths import local_file, local_folder
from speechlm2_jax.data.share_gpt import PLACEHOLDERS, ShareGptRow
from speechlm2_jax.data.storage.access import current
from speechlm2_jax.data.storage.addresses import is_remote, joined
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.data.tars import TarMember, tar_members
from speechlm2_jax.settings import SettingsError, decode_text, parse_json, read_json

_INDEX = "wids-meta.json"


def read_share_gpt_webdataset(
    data_dir: str, options: ManifestOptions, *, placeholders: Sequence[str] = PLACEHOLDERS
) -> Iterator[Conversation]:
    """Reads the tars of a folder: those of its `wids-meta.json`, else all, in order of names.

    The headers of the tars and their JSON are read, no recording. Raises SettingsError for a
    missing folder, a damaged tar, and an example that is not one JSON with at most one recording.
    """
    tars = _remote_tars(data_dir) if is_remote(data_dir) else _tars(local_folder(data_dir))
    for tar in map(str, tars):
        yield from conversations_of_rows(_rows(tar, placeholders), options)


def _tars(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        return [local_file(folder / name) for name in _listed(index)]
    tars = sorted(folder.rglob("*.tar"))
    if not tars:
        raise SettingsError(f"{folder}: neither {_INDEX} nor a .tar in it")
    return tars


def _listed(index: Path) -> list[str]:
    """The names of the tars that an index lists."""
    shards = read_json(index).get("shardlist")
    with located(str(index)):
        if not isinstance(shards, list) or not shards:
            raise SettingsError(f"shardlist must be a list of shards, got {shown(shards)}")
        return [str(shard["url"]) for shard in shards]


def _remote_tars(folder: str) -> list[str]:
    """The same of a remote folder, by their addresses."""
    try:
        index = local_file(joined(folder, _INDEX))
    except StorageError as error:
        if error.cause != "missing":
            raise
    else:
        return [joined(folder, name) for name in _listed(index)]
    tars = [joined(folder, name) for name in current().names(folder) if name.endswith(".tar")]
    if not tars:
        raise SettingsError(f"{folder}: neither {_INDEX} nor a .tar in it")
    return tars


def _rows(tar: str, placeholders: Sequence[str]) -> Iterator[tuple[str, Callable[[], ManifestRow]]]:
    """The examples of a tar: members next to each other whose names differ in the suffix alone."""
    members, storage = tar_members(tar), current()
    for name, both in _examples(members):
        where = f"{tar} {name}"
        texts = [one for one in both if one.name.endswith(".json")]
        audio = [one for one in both if not one.name.endswith(".json")]
        if len(texts) != 1 or len(audio) > 1:
            raise SettingsError(
                f"{where}: has {', '.join(one.name for one in both)}; an example is a .json "
                "and, where it has one, a recording of the same name"
            )
        with located(f"{tar} {texts[0].name}"):
            row = _object(storage.read(tar, texts[0].start, texts[0].size))
        row.setdefault("id", PurePosixPath(name).name)
        name_of = audio[0].name if audio else None
        yield where, partial(ShareGptRow, row, _find(tar, audio), placeholders, name_of)


def _object(data: bytes) -> dict[str, Any]:
    row = parse_json(decode_text(data))
    if not isinstance(row, dict):
        raise SettingsError(f"must hold a JSON object, got {shown(row)}")
    return row


def _find(tar: str, audio: Sequence[TarMember]) -> Find:
    """The recording of the example, whatever path it had before it was packed."""
    storage = current()

    def find(name: str) -> AudioLocation:
        if not audio:
            raise SettingsError(f"{name!r} is not beside its .json in {tar}; pack it there")
        return AudioLocation(tar, (audio[0].start, audio[0].size), storage=storage)

    return find


def _examples(members: Sequence[TarMember]) -> Iterator[tuple[str, list[TarMember]]]:
    """Runs of members whose names are the same without their suffix."""
    run: list[TarMember] = []
    name = ""
    for member in members:
        own = str(PurePosixPath(member.name).with_suffix(""))
        if run and own != name:
            yield name, run
            run = []
        run.append(member)
        name = own
    if run:
        yield name, run
