"""Manifests and Lhotse cuts as conversations. Lhotse is imported only where it reads.

All that later plans rest on (ids, texts, durations) comes from the manifests; no audio file is
opened here, but for a conversation's clip that declares no duration.
"""

import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError, audio_length
from speechlm2_jax.data.conversations import (
    DEFAULT_LOCATOR_TAG,
    AudioClip,
    AudioTurn,
    Conversation,
    TextTurn,
)
from speechlm2_jax.settings import SettingsError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_SHARDS = re.compile(r"(?:_OP_|[{(\[<])(\d+)\.\.(\d+)(?:_CL_|[})\]>])")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the lines of one manifest become conversations."""

    locator_tag: str = DEFAULT_LOCATOR_TAG
    token_equivalent_duration_s: float | None = None
    tags: Mapping[str, Any] | None = None
    """Fields that go before the manifest's own."""
    text_field: str = "text"
    channel: int | None = None
    """Channel of recordings with several, where the manifest does not choose; None: the mean."""


def read_manifest(path: str | Path, reading: Reading) -> Iterator[Conversation]:
    """Reads a manifest whose first line tells what it is.

    A line with `audio_filepath` is NeMo's, one with `conversations` holds turns, any other is a
    Lhotse cut. Raises SettingsError for a missing file and for a line that cannot be read, naming
    it.
    """
    path = local_file(path)
    first = next(iter(_lines(path)), None)
    if first is None:
        raise SettingsError(f"{path}: the manifest is empty")
    if "conversations" in first[1]:
        yield from _read_conversations(path, reading)
    elif "audio_filepath" in first[1]:
        yield from _read_nemo(path, reading)
    else:
        for cut in read_cuts(path):
            yield conversation_of_cut(cut, clip_of_cut(cut, reading.channel), reading)


def read_cuts(path: str | Path, fields: tuple[str, ...] = ()) -> Iterator[Any]:
    """The Lhotse cuts of a manifest, with absolute paths of their audio and of some fields' audio.

    Raises SettingsError for a missing file and for lines that are no cuts.
    """
    from lhotse import CutSet

    path = local_file(path)
    finder = _Finder(path)
    try:
        for cut in CutSet.from_file(path):
            _resolve_sources(cut, fields, finder)
            yield cut
    except SettingsError:
        raise
    except Exception as error:  # Lhotse raises whatever a wrong line makes it raise
        raise SettingsError(f"{path}: not Lhotse cuts ({error})") from error


def local_file(path: str | Path) -> Path:
    """The path of a file that exists on this machine. Raises SettingsError if it does not."""
    refuse_url(str(path), str(path))
    found = Path(path).expanduser()
    if not found.is_file():
        raise SettingsError(f"{path}: no such file")
    return found


def expand_shards(paths: str | tuple[str, ...]) -> list[str]:
    """Expands `{0..3}` and NeMo's `_OP_0..3_CL_` in paths."""
    todo, done = [paths] if isinstance(paths, str) else list(paths), []
    while todo:
        path = todo.pop(0)
        match = _SHARDS.search(path)
        if match is None:
            done.append(path)
            continue
        low, high = int(match[1]), int(match[2])
        numbers = [str(n).zfill(len(match[1])) for n in range(low, high + 1)]
        todo[:0] = [path[: match.start()] + n + path[match.end() :] for n in numbers]
    return done


def refuse_url(path: str, where: str) -> None:
    """Raises SettingsError, naming `where`, for a path that is an address or a command."""
    if _URL.match(path):
        raise SettingsError(f"{where}: {path} is not on this machine; copy it to a local disk")


class _Finder:
    """Audio paths of one manifest: relative ones lie beside it or, failing that, here.

    The first relative path decides for the whole manifest, so a disk is asked once.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        self._folder: Path | None = None

    def __call__(self, path: str) -> str:
        refuse_url(path, str(self.manifest))
        if Path(path).is_absolute():
            return path
        if self._folder is None:
            beside = self.manifest.parent
            here = not os.path.exists(beside / path) and os.path.exists(path)
            self._folder = Path.cwd() if here else beside.absolute()
        return str(self._folder / path)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a file, with the words that name its line."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield f"{path} line {number}", row
        except (ValueError, OSError, EOFError) as error:
            raise SettingsError(f"{path}: not lines of JSON ({error})") from error


def _read_nemo(path: Path, reading: Reading) -> Iterator[Conversation]:
    finder = _Finder(path)
    for where, row in _lines(path):
        if row.pop("_skipme", False):
            continue
        audio, duration_s = row.pop("audio_filepath", None), _seconds(row, "duration", where)
        if not isinstance(audio, str) or duration_s is None:
            raise SettingsError(f"{where}: audio_filepath and duration are required")
        offset_s = _seconds(row, "offset", where)
        stem = Path(audio).stem
        clip = AudioClip(
            id=stem
            if offset_s is None
            else f"{stem}-{_hundredths(offset_s)}-{_hundredths(duration_s)}",
            path=finder(audio),
            offset_s=offset_s or 0.0,
            duration_s=duration_s,
            channel=reading.channel,
            is_segment=offset_s is not None,
        )
        yield _ask_and_answer(
            str(row.get("id") or clip.id), clip, row.get(reading.text_field), row, reading
        )


def _read_conversations(path: Path, reading: Reading) -> Iterator[Conversation]:
    finder = _Finder(path)
    for where, row in _lines(path):
        fields = row.get("custom") or {}
        if fields.get("_skipme") or row.get("_skipme"):
            continue
        try:
            turns = [_turn(turn, where, finder, reading) for turn in row["conversations"]]
            first = turns[0]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise SettingsError(f"{where}: not a conversation ({error!r})") from error
        tags = reading.tags or {}
        if (
            isinstance(first, AudioTurn)
            and first.role == "user"
            and tags.get("context") is not None
        ):
            turns.insert(0, TextTurn(role="user", text=str(tags["context"])))
        if first.role != "system" and tags.get("system_prompt") is not None:
            turns.insert(0, TextTurn(role="system", text=str(tags["system_prompt"])))
        yield Conversation(
            id=str(row.get("id", where)),
            turns=tuple(turns),
            token_equivalent_duration_s=reading.token_equivalent_duration_s,
            fields={**fields, **tags},
        )


def _turn(
    turn: dict[str, Any], where: str, finder: _Finder, reading: Reading
) -> TextTurn | AudioTurn:
    role, value = turn["from"].lower(), turn["value"]
    if turn.get("type", "text") == "text":
        return TextTurn(role=role, text=value)
    path = finder(value)
    offset_s = _seconds(turn, "offset", where) or 0.0
    declared_s = _seconds(turn, "duration", where)
    duration_s = _rest_of_file_s(path, offset_s) if declared_s is None else declared_s
    ends = f"_{offset_s:.3f}_{duration_s:.3f}" if offset_s > 0 else ""
    clip = AudioClip(
        id=Path(value).stem + ends,
        path=path,
        offset_s=offset_s,
        duration_s=duration_s,
        channel=reading.channel,
    )
    return AudioTurn(role=role, clip=clip, locator_tag=reading.locator_tag)


def _ask_and_answer(
    name: str, clip: AudioClip, answer: Any, own: Mapping[str, Any], reading: Reading
) -> Conversation:
    """A recording as a conversation: context if any, the audio, and its text as the answer."""
    fields = {**own, **(reading.tags or {})}
    turns: list[TextTurn | AudioTurn] = []
    for key, role in (("system_prompt", "system"), ("context", "user")):
        if fields.get(key) is not None:
            turns.append(TextTurn(role=role, text=str(fields[key])))
    turns.append(AudioTurn(role="user", clip=clip, locator_tag=reading.locator_tag))
    if answer is not None:
        turns.append(TextTurn(role="assistant", text=str(answer)))
    return Conversation(
        id=name,
        turns=tuple(turns),
        token_equivalent_duration_s=reading.token_equivalent_duration_s,
        fields=fields,
    )


def conversation_of_cut(cut: Any, clip: AudioClip, reading: Reading) -> Conversation:
    """A cut as a conversation: its recording, and the text of its first supervision as answer."""
    text = cut.supervisions[0].text if cut.supervisions else None
    return _ask_and_answer(cut.id, clip, text, getattr(cut, "custom", None) or {}, reading)


def clip_of_cut(cut: Any, channel: int | None) -> AudioClip:
    """A cut as a stretch of a file where it is one, else as something for Lhotse to load."""
    source = _only_file(cut)
    start_s, duration_s = float(getattr(cut, "start", 0.0)), float(cut.duration)
    if source is None:
        return AudioClip(id=cut.id, path="", duration_s=duration_s, cut=cut)
    return AudioClip(
        id=cut.id,
        path=source,
        offset_s=start_s,
        duration_s=duration_s,
        channel=channel_of_cut(cut, channel),
        is_segment=start_s > 0 or duration_s < cut.recording.duration,
    )


def _only_file(cut: Any) -> str | None:
    """The file of a cut whose recording is one plain file, untransformed; else None."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1:
        return None
    source = recording.sources[0]
    is_all = cut.channel == source.channels or isinstance(cut.channel, int)
    return str(source.source) if source.type == "file" and is_all else None


def channel_of_cut(cut: Any, setting: int | None) -> int | None:
    """Where the channel of a cut is in its file; a cut of many channels takes the setting's."""
    channels = cut.recording.sources[0].channels
    if isinstance(cut.channel, int):
        return channels.index(cut.channel) if len(channels) > 1 else None
    return setting


def _sources(cut: Any, fields: tuple[str, ...]) -> Iterator[Any]:
    """Where Lhotse would read the recording of a cut from, and those in some fields."""
    custom = getattr(cut, "custom", None) or {}
    for recording in (getattr(cut, "recording", None), *map(custom.get, fields)):
        yield from getattr(recording, "sources", ())


def _resolve_sources(cut: Any, fields: tuple[str, ...], finder: _Finder) -> None:
    """Makes the paths of a cut absolute. Raises SettingsError for what is not a local file."""
    for track in getattr(cut, "tracks", None) or [None]:
        for source in _sources(cut if track is None else track.cut, fields):
            if source.type == "file":
                source.source = finder(str(source.source))
            elif source.type in ("url", "command"):
                raise SettingsError(
                    f"{finder.manifest}: cut {cut.id} reads audio from a {source.type}; copy it "
                    "to a local disk"
                )


def _rest_of_file_s(path: str, offset_s: float) -> float:
    """Seconds of audio after an offset; 0 for a bad file, which loading will report."""
    try:
        return max(audio_length(path).duration_s - offset_s, 0.0)
    except AudioError:
        return 0.0


def _seconds(row: dict[str, Any], key: str, where: str) -> float | None:
    value = row.pop(key, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
        raise SettingsError(f"{where}: {key} must be seconds, got {value!r}")
    return float(value)


def _hundredths(seconds: float) -> str:
    return f"{round(seconds * 1e2):06d}"
