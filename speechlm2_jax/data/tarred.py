"""Manifests whose recordings are members of tars: NeMo's tarred data.

Only the headers of a tar are read; each clip remembers where its bytes are. Without shuffling the
order is that of the tars, as in NeMo, which reads them from front to end.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.input_config import Paths
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import (
    DIALOGS,
    DialogFormat,
    Find,
    ManifestRow,
    NemoRow,
    audio_name,
    check_has_speakers,
    conversations_of_rows,
)
from speechlm2_jax.data.manifest_values import located, missing_key, shown
from speechlm2_jax.data.paths import expand_shards, local_files
from speechlm2_jax.data.tars import TarRecordings, plain_name
from speechlm2_jax.settings import SettingsError

SEGMENT = re.compile(r"(?P<stem>.+)-sub\d+(?P<suffix>\.\w+)?")
"""The name of one of several segments of a member."""
_MANIFEST_NUMBER = re.compile(r"manifest[^/]*_(\d+)[^/]*\.json")
_TAR_NUMBER = re.compile(r"audio[^/]*_(\d+)[^/]*\.tar")
_NAMED = 3
_REMEDY = "to leave such out, set skip_missing_manifest_entries: true"
_log = logging.getLogger(__name__)

Row = tuple[str, dict[str, Any]]
"""The words that name a row, and its fields."""
Rows = Iterator[tuple[str, Callable[[], ManifestRow]]]


class Shard(NamedTuple):
    """A tar, and the rows that describe its members."""

    tar: str
    manifest: Path
    rows: Sequence[Row]


def read_tarred(manifests: Paths, tars: Paths, options: ManifestOptions) -> Iterator[Conversation]:
    """Reads manifests and tars: paths, or patterns of shards.

    Rows are NeMo's, one recording each, or dialogs (`conversations`), whose tars are listed in the
    order of the manifests.

    Args:
        manifests: the manifests, or one of all tars.
        tars: the tars.
        options: how rows become conversations; with `skip_missing` members without a row, and rows
            without a member, are left out with a warning.

    Raises SettingsError for those without it, for a damaged file and for a wrong row.
    """
    paths = local_files(expand_shards(manifests))
    if "conversations" in _first(paths):
        yield from read_tarred_dialogs(manifests, tars, options)
        return
    for shard in tar_shards(paths, expand_shards(tars)):
        check_has_speakers(str(shard.manifest), options)
        rows = in_tar_order(shard, skip_missing=options.skip_missing)
        yield from conversations_of_rows(rows, options)


def _first(manifests: Sequence[Path]) -> dict[str, Any]:
    """The first row of manifests, some of which may be empty."""
    for path in manifests:
        for _, row in json_lines(path):
            return row
    raise SettingsError(f"{manifests[0]}: the manifest is empty")


def read_tarred_dialogs(
    manifests: Paths, tars: Paths, options: ManifestOptions, form: DialogFormat = DIALOGS
) -> Iterator[Conversation]:
    """Reads dialogs whose recordings are in tars, one tar for each manifest, in the same order."""
    paths, listed = local_files(expand_shards(manifests)), expand_shards(tars)
    if len(paths) != len(listed):
        raise SettingsError(
            f"tarred_audio_filepaths: {len(listed)} tars, but manifest_filepath has {len(paths)} "
            "manifests; list one for each, in the same order"
        )
    for path, tar in zip(paths, listed, strict=True):
        rows = dialogs_of_tar(path, TarRecordings(tar), form, skip_missing=options.skip_missing)
        yield from conversations_of_rows(rows, options)


def dialogs_of_tar(
    path: Path, recordings: TarRecordings, form: DialogFormat, *, skip_missing: bool
) -> Rows:
    """The dialogs of a manifest, but for those marked to be skipped."""
    skipped = _Skipped(recordings.tar, "dialogs with a recording that is not in it")
    for where, row in json_lines(path):
        names = form.names(row)
        missing = [name for name in names if name not in recordings]
        is_skipped = row.pop("_skipme", False) or _is_skipped(row)
        if missing and not is_skipped and not skip_missing:
            raise SettingsError(
                f"{where}: {missing[0]!r} is not in {recordings.tar}; name a member of the tar, or "
                f"{_REMEDY}"
            )
        # of several members of one name each dialog takes its own, a skipped one too
        found = [recordings(name) for name in names if name in recordings]
        if missing and not is_skipped:
            skipped.add(where)
        elif not is_skipped:
            yield where, partial(form.row, row, _one_by_one(found, recordings))
    skipped.warn()


def _one_by_one(found: Sequence[AudioLocation], otherwise: Find) -> Find:
    left = iter(found)
    return lambda name: next(left, None) or otherwise(name)


def _is_skipped(row: Mapping[str, Any]) -> bool:
    custom = row.get("custom")
    return isinstance(custom, Mapping) and bool(custom.get("_skipme"))


def in_tar_order(shard: Shard, *, skip_missing: bool) -> Rows:
    """The rows of a shard in the order of its members; segments of one by their names."""
    recordings = TarRecordings(shard.tar)
    by_member: defaultdict[str, list[tuple[str, Row]]] = defaultdict(list)
    for where, row in shard.rows:
        with located(where):
            audio = audio_name(row)
        by_member[_member_of(audio, recordings)].append((audio, (where, row)))
    _check_rows(shard, recordings, by_member, skip_missing=skip_missing)
    skipped = _Skipped(shard.tar, f"members without a row in {shard.manifest}")
    for member in recordings.members:
        if member.name not in by_member:
            skipped.add(member.name)
            if not skip_missing:
                raise SettingsError(
                    f"{shard.tar}: {member.name!r} has no row in {shard.manifest}; add one, or "
                    f"{_REMEDY}"
                )
        location = recordings.location(member)
        for _, (where, row) in sorted(by_member.get(member.name, ()), key=lambda one: one[0]):
            if not row.get("_skipme", False):
                yield where, partial(_row, dict(row), location)
    skipped.warn()


def _row(row: dict[str, Any], location: AudioLocation) -> NemoRow:
    return NemoRow(row, lambda _: location, is_packed=True)


def _member_of(audio: str, recordings: TarRecordings) -> str:
    """The member that a row describes: `a.flac`, of which `a-sub1.flac` is a segment."""
    name, match = plain_name(audio), SEGMENT.fullmatch(audio)
    if match is None or name in recordings:
        return name
    return plain_name(match["stem"] + (match["suffix"] or ""))


def _check_rows(
    shard: Shard,
    recordings: TarRecordings,
    by_member: Mapping[str, Sequence[tuple[str, Row]]],
    *,
    skip_missing: bool,
) -> None:
    """Raises SettingsError, or warns, for rows whose member the tar does not have."""
    skipped = _Skipped(shard.tar, "rows whose recording is not in it")
    for name, rows in by_member.items():
        for audio, (where, row) in () if name in recordings else rows:
            if row.get("_skipme", False):
                continue
            if not skip_missing:
                raise SettingsError(f"{where}: {audio!r} is not in {shard.tar}; {_REMEDY}")
            skipped.add(where)
    skipped.warn()


class _Skipped:
    """What is left out of a tar, for one line of the log."""

    def __init__(self, tar: str, what: str) -> None:
        self._tar, self._what = tar, what
        self._names: list[str] = []
        self._count = 0

    def add(self, name: str) -> None:
        """Counts one."""
        self._count += 1
        if self._count <= _NAMED:
            self._names.append(name)

    def warn(self) -> None:
        """Tells how many there were, and names the first."""
        if self._count:
            more = ", ..." if self._count > _NAMED else ""
            names = ", ".join(self._names) + more
            _log.warning("%s: %d %s are left out: %s", self._tar, self._count, self._what, names)


def tar_shards(manifests: list[Path], tars: list[str]) -> Iterator[Shard]:
    """Tars with their rows, in the order of the shards' numbers."""
    pairs = tars_of_manifests(manifests, tars)
    if pairs is not None:
        for path, tar in pairs:
            yield Shard(tar, path, list(json_lines(path)))
        return
    yield from shards_of_one_manifest(manifests[0], tars)


def shards_of_one_manifest(manifest: Path, tars: list[str]) -> Iterator[Shard]:
    """Tars with their rows, which have one manifest. Raises SettingsError for others."""
    by_number, rows = numbered_tars(tars), rows_by_shard(manifest)
    check_numbers(by_number, rows, manifest)
    for number in sorted(by_number):
        yield Shard(by_number[number], manifest, rows[number])


def tars_of_manifests(manifests: list[Path], tars: list[str]) -> list[tuple[Path, str]] | None:
    """Each manifest with its tar, in the order of the shards' numbers.

    None for one manifest of several tars. Raises SettingsError for names that do not go together.
    """
    pairs = pairs_of_shards([str(path) for path in manifests], tars)
    return None if pairs is None else [(Path(manifest), tar) for manifest, tar in pairs]


def pairs_of_shards(manifests: list[str], tars: list[str]) -> list[tuple[str, str]] | None:
    """The same of paths or addresses."""
    if len(manifests) == 1:
        return [(manifests[0], tars[0])] if len(tars) == 1 else None
    by_number = numbered_tars(tars)
    paths = _numbered(manifests, _MANIFEST_NUMBER, "manifest_0.json")
    _check_numbers(by_number, paths, "names of the manifests")
    return [(paths[number], by_number[number]) for number in sorted(by_number)]


def numbered_tars(tars: list[str]) -> dict[int, str]:
    """Tars by the number of their shard. Raises SettingsError for one that has none."""
    return _numbered(tars, _TAR_NUMBER, "audio_0.tar")


def _numbered(paths: list[str], pattern: re.Pattern[str], example: str) -> dict[int, str]:
    """Paths by the number of their shard. Raises SettingsError for one that has none."""
    found: dict[int, str] = {}
    for path in paths:
        match = pattern.search(path)
        if match is None:
            raise SettingsError(f"{path}: no number of a shard in the name, as {example} has it")
        if int(match[1]) in found:
            raise SettingsError(f"{path}: has the number of {found[int(match[1])]}")
        found[int(match[1])] = path
    return found


def rows_by_shard(manifest: Path) -> dict[int, list[Row]]:
    """The rows of one manifest for several tars, by their `shard_id`."""
    rows: defaultdict[int, list[Row]] = defaultdict(list)
    for where, row in json_lines(manifest):
        rows[shard_of_row(where, row)].append((where, row))
    return rows


def shard_of_row(where: str, row: Mapping[str, Any]) -> int:
    """The shard of a row. Raises SettingsError, naming `where`, for one that names none."""
    number = row.get("shard_id")
    if not isinstance(number, int) or isinstance(number, bool):
        wrong = missing_key(row, "shard_id") if number is None else f"got {shown(number)}"
        raise SettingsError(f"{where}: one manifest of several tars needs shard_id: {wrong}")
    return number


def check_numbers(tars: Mapping[int, str], rows: Collection[int], manifest: Path) -> None:
    """Raises SettingsError unless the rows of a manifest are of the shards of its tars."""
    _check_numbers(tars, rows, f"shard_id of rows in {manifest}")


def _check_numbers(tars: Mapping[int, str], others: Collection[int], what: str) -> None:
    """Raises SettingsError unless both have the same shards."""
    if set(tars) != set(others):
        lone, without = sorted(set(tars) - set(others)), sorted(set(others) - set(tars))
        raise SettingsError(
            f"tarred_audio_filepaths: the tars are shards {shown(sorted(tars))}, the {what} are "
            f"{shown(sorted(others))}; only in the tars: {shown(lone)}, only in the others: "
            f"{shown(without)}"
        )
