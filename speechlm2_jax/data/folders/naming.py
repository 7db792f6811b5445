"""What the names of folders and lists tell: the set of a recording, and its speaker."""

import re
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES

TRAIN = "train"
SET_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
"""A word in the name of a folder or list -> the set that it tells."""
GENERIC_FOLDERS = frozenset(
    (
        *("audio", "audios", "clip", "clips", "data", "dataset", "recording", "recordings"),
        *("sample", "samples", "segment", "segments", "sound", "sounds", "speech", "utterances"),
        *("voice", "voices", "wave", "waves", "wavs", "text", "texts", "txt", "other"),
        *(suffix.removeprefix(".") for suffix in AUDIO_SUFFIXES),
    )
)
"""Folders that tell what is in them, and not who."""
_WORDS = re.compile(r"[^a-z]+")


def set_named(name: str) -> str | None:
    """The set that a name tells: `Test`, or by its first or last word `dev-clean`, `list_train`.

    None for a name without such a word. Names of several words are those of sets in small letters
    only: `Dev Patel` is a person.
    """
    words = _words(name)
    ends = [words[0], words[-1]] if words and (len(words) == 1 or name == name.lower()) else []
    return next((SET_NAMES[word] for word in ends if word in SET_NAMES), None)


def set_of(root: Path, *places: Path) -> str | None:
    """The set that the first of some paths in `root` tells, by a folder or by its own name."""
    for path in places:
        inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        is_list = path.suffix.lower() not in AUDIO_SUFFIXES
        names = (*inside.parts[:-1], *((inside.stem,) if is_list else ()))
        found = next((own for name in names if (own := set_named(name))), None)
        if found is not None:
            return found
    return None


def speakers_of(root: Path, audio: Sequence[Path]) -> list[str | None]:
    """The speaker of each recording: the first folder below `root` that may name one.

    Names of sets and of what is in a folder are no speakers; nor is a folder that is the only one.
    """
    found = [_folder_of_speaker(path.relative_to(root).parts[:-1]) for path in audio]
    return found if len({*found} - {None}) > 1 else [None] * len(found)


def _folder_of_speaker(folders: Sequence[str]) -> str | None:
    for name in folders:
        words = _words(name)
        is_generic = bool(words) and GENERIC_FOLDERS.issuperset(words)
        if not is_generic and name.casefold() not in GENERIC_FOLDERS and set_named(name) is None:
            return name
    return None


def _words(name: str) -> list[str]:
    return [word for word in _WORDS.split(name.casefold()) if word]
