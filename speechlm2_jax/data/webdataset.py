"""Folders of tars in WebDataset's form: a JSON and a recording of one name are one example."""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import Find, NamedRow, conversations_of_rows
from speechlm2_jax.data.manifest_values import located, shown
from speechlm2_jax.data.paths import local_file, local_folder
from speechlm2_jax.data.share_gpt import PLACEHOLDERS, ShareGptRow
from speechlm2_jax.data.storage.access import current
from speechlm2_jax.data.storage.addresses import is_remote, joined
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.data.tar_headers import TarMember, end_of_member, members_of, read_headers
from speechlm2_jax.data.tars import plain_name, tar_members
from speechlm2_jax.settings import SettingsError, decode_text, parse_json, read_json

_INDEX = "wids-meta.json"
_JSON = ".json"


class PackedExample(NamedTuple):
    """Members of a tar next to each other, whose names differ in the suffix alone."""

    tar: str
    name: str
    place: int
    """Where the header of the first one begins, or one behind the member before it."""
    members: Sequence[TarMember]


def read_share_gpt_webdataset(
    data_dir: str, options: ManifestOptions, *, placeholders: Sequence[str] = PLACEHOLDERS
) -> Iterator[Conversation]:
    """Reads the tars of a folder: those of its `wids-meta.json`, else all, in order of names.

    The headers of the tars and their JSON are read, no recording. Raises SettingsError for a
    missing folder, a damaged tar, and an example that is not one JSON with at most one recording.
    """
    for tar in tars_of_folder(data_dir):
        rows = (row_of_example(one, placeholders) for one in examples_of_tar(tar))
        yield from conversations_of_rows(rows, options)


def tars_of_folder(data_dir: str) -> list[str]:
    """The tars of a folder or an address, in order. Raises SettingsError for one without any."""
    tars = _remote_tars(data_dir) if is_remote(data_dir) else _tars(local_folder(data_dir))
    return list(map(str, tars))


def examples_up_to(tar: str, most: int) -> int:
    """Counts the examples of a tar on a local disk, up to `most`. Raises OSError or TarError."""
    with open(tar, "rb") as file:
        found = (one for one in read_headers(file.fileno()) if one.name.endswith(_JSON))
        return sum(1 for _ in islice(found, most))


def examples_of_tar(tar: str) -> Iterator[PackedExample]:
    """The examples of a tar, in order. Raises SettingsError for a damaged one."""
    return _examples(tar, tar_members(tar), 0)


def first_example(tar: str, place: int) -> PackedExample:
    """The example whose first header is at a place or behind it, of a tar on a local disk.

    Raises SettingsError if there is none.
    """
    try:
        with open(tar, "rb", buffering=0) as file:
            total = os.fstat(file.fileno()).st_size
            found = members_of(partial(os.pread, file.fileno()), total, place)
            members = (one._replace(name=plain_name(one.name)) for one in found)
            if (example := next(_examples(tar, members, place), None)) is not None:
                return example
    except tarfile.TarError as error:
        raise SettingsError(f"{tar}: {error}") from error
    raise SettingsError(f"{tar}: no example at byte {place}")


def _tars(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        return [local_file(folder / name) for name in _listed(local_file(index))]
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


def row_of_example(example: PackedExample, placeholders: Sequence[str]) -> NamedRow:
    """The words that name an example, and what reads it; its JSON is read here."""
    tar, where, storage = example.tar, f"{example.tar} {example.name}", current()
    texts = [one for one in example.members if one.name.endswith(_JSON)]
    audio = [one for one in example.members if not one.name.endswith(_JSON)]
    if len(texts) != 1 or len(audio) > 1:
        raise SettingsError(
            f"{where}: has {', '.join(one.name for one in example.members)}; an example is a .json "
            "and, where it has one, a recording of the same name"
        )
    with located(f"{tar} {texts[0].name}"):
        row = _object(storage.read(tar, texts[0].start, texts[0].size))
    row.setdefault("id", PurePosixPath(example.name).name)
    name_of = audio[0].name if audio else None
    return where, partial(ShareGptRow, row, _find(tar, audio), placeholders, name_of)


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


def _examples(tar: str, members: Iterable[TarMember], place: int) -> Iterator[PackedExample]:
    """Runs of members whose names are the same without their suffix; `place` is the first's."""
    run: list[TarMember] = []
    name, begin = "", place
    for member in members:
        own = str(PurePosixPath(member.name).with_suffix(""))
        if run and own != name:
            yield PackedExample(tar, name, begin, run)
            run, begin = [], place
        run.append(member)
        name, place = own, end_of_member(member)
    if run:
        yield PackedExample(tar, name, begin, run)
