"""Lhotse cuts as conversations. Lhotse is imported only where it reads."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from speechlm2_jax.data.conversations import AudioClip, Conversation
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.lhotse_types import Cut
from speechlm2_jax.data.manifest_options import ManifestOptions, conversation_of_recording
from speechlm2_jax.data.manifest_values import check_channel, located, mapping, seconds
from speechlm2_jax.data.paths import Finder, local_file
from speechlm2_jax.data.spoken_dialogs import UnknownSpeakerError, dialog_of_cut
from speechlm2_jax.data.storage.access import StorageAccess, current
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.storage.downloads import shown
from speechlm2_jax.settings import SettingsError

_YAML = (".yaml", ".yml")
_NAMED = 3
_CUT_TYPES = ("MonoCut", "MultiCut", "MixedCut")
_log = logging.getLogger(__name__)


def read_cuts(path: str | Path, fields: tuple[str, ...] = ()) -> Iterator[tuple[str, Cut]]:
    """The Lhotse cuts of a manifest, each with the words that name its place.

    Paths of their audio, and of some fields' audio, are absolute. Raises SettingsError for a
    missing or damaged file, and for lines that are no cuts.
    """
    path = local_file(path)
    finder = Finder(path)
    for where, cut in _whole(path) if is_whole(path) else _lines(path):
        with located(where):
            _resolve_sources(cut, fields, finder)
        yield where, cut


def is_whole(path: Path) -> bool:
    """Whether a manifest is one list, which Lhotse reads, and not an object per line."""
    if path.suffix in _YAML:
        return True
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _whole(path: Path) -> Iterator[tuple[str, Any]]:
    from lhotse import CutSet

    with located(f"{path}: not Lhotse cuts"):
        try:
            cuts = list(CutSet.from_file(path))
        except Exception as error:  # Lhotse raises whatever a wrong file makes it raise
            raise SettingsError(" ".join(str(error).split())[:200]) from error
    for number, cut in enumerate(cuts, start=1):
        yield f"{shown(path)} cut {number}", cut


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, row in json_lines(path):
        with located(f"{where}: not Lhotse cuts"):
            cut = _deserialized(row)
        yield where, cut


def cut_of_row(row: dict[str, Any], fields: tuple[str, ...], finder: Finder) -> Cut:
    """The cut of one line, as `read_cuts` gives it. Raises SettingsError for what is none."""
    with located("not Lhotse cuts"):
        cut = _deserialized(row)
    _resolve_sources(cut, fields, finder)
    return cut


def _deserialized(row: dict[str, Any]) -> Any:
    from lhotse.cut import Cut
    from lhotse.serialization import deserialize_item

    mapping(row.get("custom"), "custom")
    cut = deserialize_item(row)
    if not isinstance(cut, Cut):
        raise SettingsError(f"a {type(cut).__name__}")
    for track in getattr(cut, "tracks", ()):
        _deserialize_cuts(getattr(track.cut, "custom", None) or {})
    return cut


def _deserialize_cuts(custom: dict[str, Any]) -> None:
    """Makes cuts of the fields of a track that hold some, which Lhotse leaves as they are."""
    for key, value in custom.items():
        if isinstance(value, dict) and value.get("type") in _CUT_TYPES:
            custom[key] = _deserialized(value)


class LocatedCut(NamedTuple):
    """A cut, and where its recording is."""

    where: str
    """The words that name its place."""
    cut: Cut
    clip: Callable[[], AudioClip]
    shard: int = 0


def conversations_of_cuts(
    cuts: Iterator[LocatedCut], options: ManifestOptions, name: str
) -> Iterator[Conversation]:
    """Cuts as conversations: the recording, and the text of the first supervision as the response.

    With `options.roles` each supervision is a turn, and cuts of other speakers are left out. The
    log tells of these, and of cuts with several supervisions that are read as one; `name` is the
    manifest.
    """
    several, unknown = Counter[str](), Counter[str]()
    for where, cut, clip, shard in cuts:
        with located(where):
            try:
                made = conversation_of_cut(cut, clip(), options, where=where, shard=shard)
            except UnknownSpeakerError as error:
                unknown[f"{error} in {where}"] += 1
                continue
        if options.roles is None and len(cut.supervisions) > 1:
            several[where] += 1
        yield made
    if several:
        _warn_of_dialogs(name, several)
    if unknown:
        _log.warning(
            "%s: %d dialogs are left out, as a speaker is neither in input_roles nor in "
            "output_roles: %s",
            *(name, unknown.total(), _first(unknown)),
        )


def warn_of_dialogs(path: Path, rows: int) -> None:
    """Warns of cuts with several supervisions among the first rows of a manifest, if there are."""
    several = Counter[str]()
    with suppress(SettingsError):  # told when the row's turn comes
        for where, row in islice(json_lines(path), rows):
            spoken = row.get("supervisions")
            several[where] += isinstance(spoken, list) and len(spoken) > 1
    if several.total():
        _warn_of_dialogs(str(path), +several)


def _warn_of_dialogs(name: str, several: Counter[str]) -> None:
    _log.warning(
        "%s: %d cuts have several supervisions, of which the first alone is the response; "
        "dialogs are read by type: s2s_as_conversation (%s)",
        *(name, several.total(), _first(several)),
    )


def _first(names: Counter[str]) -> str:
    return ", ".join([*names][:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def conversation_of_cut(
    cut: Cut, clip: AudioClip, options: ManifestOptions, *, where: str, shard: int = 0
) -> Conversation:
    """A cut as a conversation: its recording, and the text of its first supervision as response.

    With `options.roles` each supervision is a turn. Raises UnknownSpeakerError for a speaker who
    has no role.
    """
    if options.roles is not None:
        made = dialog_of_cut(cut, clip, options, options.roles, where=where)
    else:
        response = cut.supervisions[0].text if cut.supervisions else None
        custom, name = getattr(cut, "custom", None) or {}, str(cut.id)
        made = conversation_of_recording(name, clip, response, custom, options, where=where)
    return replace(made, shard=shard)


def clip_of_cut(cut: Cut, channel: int | None, storage: StorageAccess | None = None) -> AudioClip:
    """A cut as a stretch of a file where it is one, else as something for Lhotse to load."""
    source = _only_file(cut)
    start_s, duration_s = stretch_of_cut(cut)
    if source is None:
        return AudioClip(id=cut.id, path="", duration_s=duration_s, cut=cut)
    return AudioClip(
        id=cut.id,
        path=source,
        offset_s=start_s,
        duration_s=duration_s,
        channel=channel_of_cut(cut, channel),
        is_segment=start_s > 0 or duration_s < cut.recording.duration,
        storage=current() if storage is None else storage,
    )


def stretch_of_cut(cut: Cut) -> tuple[float, float]:
    """Start and duration of a cut. Raises SettingsError for what cannot be seconds."""
    return seconds(getattr(cut, "start", 0.0), "start"), seconds(cut.duration, "duration")


def channel_of_cut(cut: Cut, setting: int | None) -> int | None:
    """Where the channel of a cut is in its file; a cut of many channels takes the setting's."""
    check_channel(cut.channel)
    channels = cut.recording.sources[0].channels
    if isinstance(cut.channel, int):
        return channels.index(cut.channel) if len(channels) > 1 else None
    return setting


def _only_file(cut: Cut) -> str | None:
    """The file of a cut whose recording is one plain file, untransformed; else None."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1:
        return None
    source = recording.sources[0]
    is_all = cut.channel == source.channels or isinstance(cut.channel, int)
    return str(source.source) if source.type == "file" and is_all else None


def _sources(cut: Cut, fields: tuple[str, ...]) -> Iterator[Any]:
    """Where Lhotse would read a cut and its tracks from, and what some fields hold."""
    custom = getattr(cut, "custom", None) or {}
    yield from getattr(getattr(cut, "recording", None), "sources", ())
    for track in getattr(cut, "tracks", ()):
        yield from _sources(track.cut, fields)
    for value in map(custom.get, fields):
        if hasattr(value, "sources"):
            yield from value.sources
        elif value is not None and not isinstance(value, dict):
            yield from _sources(value, ())


def _resolve_sources(cut: Cut, fields: tuple[str, ...], finder: Finder) -> None:
    """Makes the paths of a cut absolute. Raises SettingsError for what may not be read."""
    for source in _sources(cut, fields):
        name = str(source.source)
        if source.type == "url" and (name.lower().startswith("file:") or is_remote(name)):
            source.type = "file"  # ours to read, as all that is one file
        if source.type == "file":
            source.source = finder(str(source.source))
        elif source.type in ("url", "command"):
            raise SettingsError(
                f"cut {cut.id} reads audio from a {source.type}; copy it to a local disk"
            )
