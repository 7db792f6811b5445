"""The files of a folder, found by names in whichever Unicode form these are written."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.data.paths import files_below, is_file


@dataclass(frozen=True)
class FolderFiles:
    """All files in a folder and in the folders below it."""

    root: Path
    paths: tuple[Path, ...]
    """Sorted; each begins with `root`."""

    @classmethod
    def below(cls, root: Path) -> "FolderFiles":
        """The files of a folder, as `files_below` lists them."""
        return cls(root, tuple(files_below(root)))

    @cached_property
    def audio(self) -> tuple[Path, ...]:
        """The recordings."""
        return tuple(path for path in self.paths if _is_audio(path))

    def named(self, pattern: str) -> list[Path]:
        """The files whose names match a pattern such as `*.trans.txt`."""
        return [path for path in self.paths if path.match(pattern) and is_file(path)]

    def find(self, path: Path) -> Path | None:
        """The file of this name; None if there is none.

        macOS may keep `é` as `e` and an accent where a list has one character: both are one name.
        A path out of the folder is looked up as it is written.
        """
        if is_file(path):
            return path
        found = self._by_name.get(_plain(path))
        return found if found is not None and is_file(found) else None

    def placed(self, name: str, folders: Sequence[Path]) -> Path:
        r"""Where the recording of a list is: in the first folder that has it.

        Its suffix may be left out, as Common Voice, LibriSpeech and LJSpeech do; `\` separates
        folders on Windows. A recording that is nowhere is named as in the first folder.
        """
        found = (self.find(path) for path in _candidates(name, folders))
        return next((path for path in found if path is not None), folders[0] / name)

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        return {_plain(path): path for path in self.paths}


def _is_audio(path: Path) -> bool:
    is_named_so = path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("._")
    return is_named_so and not path.is_dir()


def _candidates(name: str, folders: Sequence[Path]) -> Iterator[Path]:
    spelt = dict.fromkeys((name, name.replace("\\", "/")))
    whole = [folder / one for one in spelt for folder in folders]
    yield from whole
    for path in whole:
        for end in AUDIO_SUFFIXES if path.name else ():
            yield path.with_name(path.name + end)


def _plain(path: Path) -> str:
    """A path with each accented letter as one character, where Unicode has it (NFC)."""
    return unicodedata.normalize("NFC", os.path.normpath(path))
