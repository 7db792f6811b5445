"""The recordings that `speechlm2-jax transcribe` is given: files, folders, patterns, lists."""

import glob
import os
import re
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.storage.addresses import is_remote, name_of
from speechlm2_jax.evaluation.inputs import Utterance, read_inputs
from speechlm2_jax.settings import SettingsError

STDIN = "-"
"""The input that stands for a list of inputs, one a line, on standard input."""
SAME_S = 1e-3
"""Durations that differ by less are the same: manifests round them."""
_SIGNS = "*?["
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')


@dataclass(frozen=True, kw_only=True)
class GivenRecording:
    """A recording to transcribe, and where its transcript belongs."""

    utterance: Utterance
    key: Hashable
    """Tells it from other recordings: its file and the stretch, channel or bytes of it."""
    name: str
    """What messages and json call it."""
    stem: Path
    """Its outputs beside it, without their suffix; in the working folder for an address."""
    inside: Path
    """Its outputs in the folder that was given, without suffix; the name alone for a file."""
    place: Path
    """As `stem`, absolute; of an address, with its host and folders."""
    holder: str
    """The file or address that it is read from, or the input that names it."""
    inner: str = ""
    """What tells it from others in `holder`: a stretch, a channel, an id."""
    is_of_holder: bool = True
    """Whether it is another recording where `holder` changes; not where a list names it."""
    file: Path | None = None
    """Its own file, if it has one on this machine."""
    apart: str = ""
    """What its name gets at its end where another has the same, such as `.wav`."""
    offset_s: float = 0.0
    """Where it starts in its file, in seconds."""
    channel: int | None = None
    """The channel of its file; None: all."""
    member: str | None = None
    """Where it lies in a tar or a table, if it does."""


def find_sources(inputs: Sequence[str], stdin: TextIO | None = None) -> list[GivenRecording]:
    """Lists the recordings of all inputs, each once, in the order of the inputs.

    An input is an audio file, a folder (searched for audio with all folders in it), a pattern such
    as `a/**/*.wav`, a manifest (.jsonl), an address, or `-`: further inputs on standard input.
    Raises SettingsError for one that is missing, of another kind, or without recordings.
    """
    found: dict[Hashable, GivenRecording] = {}
    for given in _expanded(inputs, sys.stdin if stdin is None else stdin):
        for source in _sources(given):
            other = found.setdefault(source.key, source)
            both_s = other.utterance.duration_s, source.utterance.duration_s
            if all(both_s) and abs(both_s[0] - both_s[1]) > SAME_S:
                raise SettingsError(
                    f"{source.name}: two rows of different durations start at "
                    f"{source.offset_s:g} s; transcribe them apart"
                )
    if not found:
        raise SettingsError("there is nothing to transcribe; name audio files or folders")
    return list(found.values())


def safe_name(name: str) -> str:
    """A name, such as the id of a cut, as that of a file: it cannot lead to another folder."""
    safe = _UNSAFE.sub("_", name)
    return safe if safe and not safe.startswith(".") else f"_{safe}"


def _expanded(inputs: Iterable[str], stdin: TextIO) -> Iterator[str]:
    for given in inputs:
        if given == STDIN:
            lines = (line.removeprefix("\ufeff").strip() for line in stdin)
            yield from _expanded([line for line in lines if line and line != STDIN], stdin)
        elif any(sign in given for sign in _SIGNS) and not os.path.exists(given):
            matches = sorted(glob.glob(os.path.expanduser(given), recursive=True))
            if not matches:
                raise SettingsError(f"no file or folder matches {given!r}")
            yield from matches
        else:
            yield given


def _sources(given: str) -> Iterator[GivenRecording]:
    try:
        utterances = read_inputs(given)
    except SettingsError as error:
        raise SettingsError(str(error).removeprefix("inputs: ")) from error
    for utterance in utterances:
        clip = utterance.clip
        if utterance.dialog is not None or (clip is not None and clip.cut is not None):
            yield _without_file(utterance, given)
        elif clip is not None and (clip.byte_range is not None or clip.cell is not None):
            yield _packed(utterance, clip)
        else:
            inside = utterance.id if clip is None and os.path.isdir(given) else None
            path = utterance.source if clip is None else clip.path
            yield _of_file(utterance, path, inside, clip)


def _of_file(
    utterance: Utterance, path: str, inside: str | None, clip: AudioClip | None
) -> GivenRecording:
    """A file or an address, or a stretch of one, which has outputs of its own."""
    offset_s, channel = (0.0, None) if clip is None else (clip.offset_s, clip.channel)
    is_far = is_remote(path)
    stem, suffix = _split(safe_name(name_of(path)) if is_far else path)
    stem += _stretch(offset_s, channel)
    place = Path(os.path.abspath(_folder_of_address(path) / stem if is_far else stem))
    return GivenRecording(
        utterance=utterance,
        key=(path if is_far else os.path.abspath(path), offset_s, channel),
        name=path,
        stem=Path(stem),
        inside=Path(os.path.basename(stem) if inside is None else _split(inside)[0]),
        place=place,
        holder=path,
        inner=_stretch(offset_s, channel),
        file=None if is_far else Path(path),
        apart=suffix,
        offset_s=offset_s,
        channel=channel,
    )


def _packed(utterance: Utterance, clip: AudioClip) -> GivenRecording:
    """A recording inside a tar or a table; its outputs lie beside that, named by its id."""
    start = (clip.byte_range or ())[:1] if clip.cell is None else clip.cell[:2]
    member = "_".join(map(str, start))
    name = _split(safe_name(utterance.id))[0] + _stretch(clip.offset_s, clip.channel)
    is_far = is_remote(clip.path)
    folder = _folder_of_address(clip.path) if is_far else Path(clip.path).parent
    return GivenRecording(
        utterance=utterance,
        key=(clip.path, clip.byte_range, clip.cell, clip.offset_s, clip.channel),
        name=f"{clip.path}/{utterance.id}",
        stem=Path(name) if is_far else folder / name,
        inside=Path(name),
        place=Path(os.path.abspath(folder / name)),
        holder=clip.path,
        inner=f"/{utterance.id}{_stretch(clip.offset_s, clip.channel)}",
        apart=f"_{member}",
        member=member,
        offset_s=clip.offset_s,
        channel=clip.channel,
    )


def _without_file(utterance: Utterance, given: str) -> GivenRecording:
    """A cut that Lhotse mixes, or a dialog: outputs lie beside the input, named by its id."""
    name = safe_name(utterance.id)
    folder = Path(given) if os.path.isdir(given) else Path(given).parent
    stem = Path(name) if is_remote(given) else folder / name
    return GivenRecording(
        utterance=utterance,
        key=(given, utterance.source, utterance.id),
        name=f"{given}/{utterance.id}",
        stem=stem,
        inside=Path(name),
        place=Path(os.path.abspath(stem)),
        holder=given,
        inner=f"/{utterance.id}",
        is_of_holder=False,
    )


def _split(path: str) -> tuple[str, str]:
    """A path without the suffix of a recording, and that; `rec-1.25` has none."""
    stem, suffix = os.path.splitext(path)
    return (stem, suffix) if suffix.lower() in AUDIO_SUFFIXES else (path, "")


def _stretch(offset_s: float, channel: int | None) -> str:
    """What a stretch, or a channel, adds to the name of its file."""
    of_channel = f"_channel{channel}" if channel else ""
    return (f"_{offset_s}" if offset_s else "") + of_channel


def _folder_of_address(address: str) -> Path:
    """Where an address lies among others: its host, or bucket, and folders."""
    parts = urlsplit(address)
    return Path(safe_name(parts.netloc), *map(safe_name, parts.path.split("/")[1:-1]))
