"""Manifests as conversations: NeMo's lines, lines of turns, and Lhotse cuts.

Ids, texts and durations are read here. As in NeMo, the header of a recording is read for its
length unless the manifest gives a sampling rate; samples are never read here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.cuts import LocatedCut, clip_of_cut, conversations_of_cuts, read_cuts
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import (
    DialogRow,
    Find,
    ManifestRow,
    NemoRow,
    check_has_speakers,
    conversations_of_rows,
)
from speechlm2_jax.data.manifest_values import missing_key, near_miss
from speechlm2_jax.data.paths import Finder, local_file
from speechlm2_jax.settings import SettingsError

CUT_KEYS = ("type", "recording", "supervisions", "features", "tracks", "start")


def read_manifest(path: str | Path, options: ManifestOptions) -> Iterator[Conversation]:
    """Reads a manifest whose first line tells what it is.

    A line with `audio_filepath` is NeMo's, one with `conversations` holds turns, any other is a
    Lhotse cut. Raises SettingsError for a missing file and for a line that cannot be read, naming
    it.
    """
    path = local_file(path)
    first = next(json_lines(path), None)
    if first is None:
        raise SettingsError(f"{path}: the manifest is empty")
    where, row = first
    if "conversations" in row:
        yield from conversations_of_rows(_rows(path, DialogRow), options)
    elif "audio_filepath" in row:
        check_has_speakers(where, options)
        yield from conversations_of_rows(_rows(path, NemoRow), options)
    elif any(key in row for key in CUT_KEYS):
        cuts = (
            LocatedCut(where, cut, partial(clip_of_cut, cut, options.channel))
            for where, cut in read_cuts(path)
        )
        yield from conversations_of_cuts(cuts, options, str(path))
    else:
        is_dialog = near_miss(row, "audio_filepath") is None and near_miss(row, "conversations")
        key = "conversations" if is_dialog else "audio_filepath"
        raise SettingsError(
            f"{where}: neither a NeMo manifest nor conversations nor Lhotse cuts: "
            f"{missing_key(row, key)}"
        )


def beside(manifest: Path) -> Find:
    """Where the recordings are that a manifest names: files of this machine."""
    finder = Finder(manifest)
    return lambda name: AudioLocation(finder(name), storage=finder.storage)


def _rows(
    path: Path, kind: type[NemoRow] | type[DialogRow]
) -> Iterator[tuple[str, Callable[[], ManifestRow]]]:
    """The rows of a manifest of one kind, but for those marked `_skipme`."""
    find = beside(path)
    for where, row in json_lines(path):
        if not row.pop("_skipme", False):
            yield where, partial(kind, row, find)
