"""What the outputs of each recording are called: beside it, or in one folder, no two alike."""

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription.inputs import GivenRecording

Stems = Mapping[Hashable, Path]
"""Key of a recording -> the path of its outputs without their suffix."""


def stem_of(source: GivenRecording, folder: Path | None) -> Path:
    """The usual name: in `folder` as the recording lies in the one that was given; else beside."""
    return source.stem if folder is None else folder / source.inside


def name_outputs(sources: Sequence[GivenRecording], folder: Path | None) -> Stems:
    """Names the outputs of all recordings.

    Recordings whose outputs would have the same name (a.wav, a.mp3) keep their suffixes. If two of
    several folders still have one name in `folder`, all lie in their own folders there. Raises
    SettingsError for two recordings that nothing tells apart, and for a name outside `folder`.
    """
    stems = _named_apart(sources, lambda source: stem_of(source, folder))
    if folder is not None and _clash(stems):
        stems = _named_apart(sources, _below(folder, sources))
    names = {source.key: source.name for source in sources}
    if clash := _clash(stems):
        raise SettingsError(
            f"{names[clash[0]]} and {names[clash[1]]} would have the same output, "
            f"{stems[clash[0]]}; transcribe them with two --output-dir"
        )
    for key, stem in stems.items() if folder is not None else ():
        if not Path(os.path.abspath(stem)).is_relative_to(os.path.abspath(folder or "")):
            raise SettingsError(f"{names[key]}: its output {stem} would not be in {folder}")
    return stems


def _named_apart(
    sources: Sequence[GivenRecording], stem: Callable[[GivenRecording], Path]
) -> dict[Hashable, Path]:
    """Key -> path of outputs; with the recording's suffix if another has the same stem.

    The other may be given too, or lie in the same folder: its outputs are no outputs of this one.
    """
    stems = {source.key: stem(source) for source in sources}
    counts = Counter(map(os.path.abspath, stems.values()))
    for source in sources:
        own = stems[source.key]
        if counts[os.path.abspath(own)] > 1 or _has_sibling(source.file):
            stems[source.key] = own.with_name(own.name + source.apart)
    return stems


def _has_sibling(file: Path | None) -> bool:
    """Whether a recording with another suffix lies beside this one."""
    return file is not None and len(_recordings_of(file.parent).get(file.stem, ())) > 1


@functools.lru_cache(maxsize=64)
def _recordings_of(folder: Path) -> Mapping[str, set[str]]:
    """Stem -> suffixes of the recordings in a folder; empty for one that is not there."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in os.listdir(folder) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in AUDIO_SUFFIXES:
            found[stem].add(suffix)
    return found


def _clash(stems: Stems) -> tuple[Hashable, Hashable] | None:
    """Two recordings with one path of outputs; None if there are none."""
    first: dict[str, Hashable] = {}
    for key, stem in stems.items():
        other = first.setdefault(os.path.abspath(stem), key)
        if other != key:
            return other, key
    return None


def _below(folder: Path, sources: Sequence[GivenRecording]) -> Callable[[GivenRecording], Path]:
    """Places the outputs in `folder` as the recordings lie in the folder that holds them all."""
    root = os.path.commonpath([source.place.parent for source in sources])
    return lambda source: folder / source.place.relative_to(root)
