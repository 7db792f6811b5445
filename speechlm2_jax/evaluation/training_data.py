"""What the training manifests of a run hold: voices, texts and recordings, to find in a test set.

Two recordings are the same if they are the same stretch of the same file, or files of equal bytes.
A copy in another format is not found.
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.evaluation.inputs import Utterance, voice_of
from speechlm2_jax.evaluation.metrics.wer import Normalizer
from speechlm2_jax.settings import SettingsError

MAX_LISTED_BYTES = 32 << 20
"""Larger manifests are not read."""
_BINS_PER_S = 100


@dataclass
class TrainingData:
    """Voices, normalised responses and recordings of the training."""

    normalize: Normalizer
    rows: int = 0
    unread: list[str] = field(default_factory=list)
    """Manifests that are missing, too large or damaged, and sources without a manifest."""
    voices: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    _places: set[tuple[Any, ...]] = field(default_factory=set)
    _files: dict[int, set[str]] = field(default_factory=dict)
    """Whole files by length in hundredths of a second."""

    def add(self, manifest: Path) -> None:
        """Adds a manifest, or its name to `unread`."""
        if not manifest.is_file() or manifest.stat().st_size > MAX_LISTED_BYTES:
            self.unread.append(str(manifest))
            return
        try:
            for conversation in read_manifest(manifest, ManifestOptions()):
                self.rows += 1
                if (voice := voice_of(conversation)) is not None:
                    self.voices.add(voice)
                self.texts.add(self._words(conversation.response))
                for clip in conversation.clips:
                    self._add_clip(clip)
        except SettingsError:
            self.unread.append(str(manifest))

    def _add_clip(self, clip: AudioClip) -> None:
        self._places.add(_place(clip))
        if _is_whole_file(clip):
            self._files.setdefault(_bin(clip), set()).add(clip.path)

    def marked(self, utterances: Sequence[Utterance]) -> list[Utterance]:
        """The utterances, with what also occurs in the training marked."""
        return [
            replace(
                u,
                is_unseen=u.is_unseen
                if not self.voices
                else u.voice is not None and u.voice not in self.voices,
                is_seen_text=self.has_text(u.text),
                is_seen_audio=any(map(self.has_recording, clips_of(u))),
            )
            for u in utterances
        ]

    def has_text(self, text: str | None) -> bool:
        """Whether a text with words is a response of the training."""
        words = self._words(text)
        return bool(words) and words in self.texts

    def _words(self, text: str | None) -> str:
        """A text as it is compared: normalised, one space between words."""
        return " ".join(self.normalize(text or "").split())

    def has_recording(self, clip: AudioClip) -> bool:
        """Whether a recording is one of the training."""
        if _place(clip) in self._places:
            return True
        if not _is_whole_file(clip):
            return False
        near = (self._files.get(_bin(clip) + step, ()) for step in (-1, 0, 1))
        others = [path for paths in near for path in paths]
        return any(_have_equal_bytes(clip.path, path) for path in others)


def clips_of(utterance: Utterance) -> tuple[AudioClip, ...]:
    """The recordings of an utterance that a manifest names."""
    if utterance.dialog is not None:
        return utterance.dialog.clips
    return () if utterance.clip is None else (utterance.clip,)


def _place(clip: AudioClip) -> tuple[Any, ...]:
    """Where its samples are; offsets are rounded, as manifests round them."""
    name = clip.id if clip.cut is not None else ""
    return clip.path, clip.byte_range, clip.cell, round(clip.offset_s, 2), name


def _is_whole_file(clip: AudioClip) -> bool:
    is_inside = clip.byte_range is not None or clip.cell is not None or clip.cut is not None
    return not (is_inside or clip.is_segment or is_remote(clip.path))


def _bin(clip: AudioClip) -> int:
    return round(clip.duration_s * _BINS_PER_S)


def _have_equal_bytes(path: str, other: str) -> bool:
    """Whether two files are equal; a file is read only if one of equal size is looked for."""
    size = _size(path)
    return size is not None and size == _size(other) and _digest(path) == _digest(other)


@functools.lru_cache(maxsize=1 << 16)
def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None


@functools.lru_cache(maxsize=1 << 16)
def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
