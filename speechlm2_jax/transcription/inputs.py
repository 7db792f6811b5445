"""The recordings that `speechlm2-jax transcribe` is given: files, folders, patterns, lists."""

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from speechlm2_jax.evaluation.inputs import Utterance, read_inputs
from speechlm2_jax.settings import SettingsError

STDIN = "-"
"""The input that stands for a list of inputs, one a line, on standard input."""
_SIGNS = "*?["
_ROW_OF_MANIFEST = re.compile(r"(?P<path>.+)@(?P<offset>\d[\d.e+-]*)", re.DOTALL)
"""The source of an utterance of a manifest; names of files may hold `@` too."""


@dataclass(frozen=True)
class GivenRecording:
    """A recording to transcribe, and where its transcript belongs."""

    utterance: Utterance
    beside: Path
    """The recording's path, or its address as a path: outputs lie beside it, named as it is."""
    inside: Path
    """Its path inside the folder that was given; its file name if a file was given."""
    name: str
    """What messages and json call it."""
    offset_s: float = 0.0
    """Where it starts in its file, in seconds."""


def find_sources(inputs: Sequence[str], stdin: TextIO | None = None) -> list[GivenRecording]:
    """Lists the recordings of all inputs, each once, in the order of the inputs.

    An input is an audio file, a folder (searched for audio with all folders in it), a pattern such
    as `a/**/*.wav`, a manifest (.jsonl), an address, or `-`: further inputs on standard input.
    Raises SettingsError for one that is missing, of another kind, or without recordings.
    """
    found: dict[str, GivenRecording] = {}
    for given in _expanded(inputs, sys.stdin if stdin is None else stdin):
        for source in _sources(given):
            own = source.utterance.source
            other = found.setdefault(own if "://" in own else os.path.abspath(own), source)
            if other.utterance.duration_s != source.utterance.duration_s:
                raise SettingsError(
                    f"{own}: two rows of different durations start here; transcribe them apart"
                )
    if not found:
        raise SettingsError("there is nothing to transcribe; name audio files or folders")
    return list(found.values())


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
    is_folder = os.path.isdir(given)
    for utterance in utterances:
        row = _ROW_OF_MANIFEST.fullmatch(utterance.source)
        path, offset_s = (row["path"], float(row["offset"])) if row else (utterance.source, 0.0)
        beside = Path(path)
        if row and offset_s:  # a stretch of a file has a file of its own
            beside = beside.with_stem(f"{beside.stem}_{row['offset']}")
        inside = Path(utterance.id) if is_folder else Path(beside.name)
        yield GivenRecording(utterance, beside, inside, path, offset_s)
