"""What to answer: manifests, Lhotse cuts, SHAR, or plain audio files, all as utterances."""

import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError, audio_length, read_audio
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.paths import plain_path
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.settings import SettingsError

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".webm", ".mp4", ".wma", ".amr"),
    *(".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist", ".wv"),
    *(".ape", ".oga", ".mp2", ".mka", ".mkv", ".mov", ".3gp", ".3g2", ".m4b", ".avi", ".flv"),
    *(".ac3", ".tta", ".asf"),
)
VOICE_KEYS = ("voice", "speaker", "speaker_id")
CONDITION_KEYS = ("condition",)
UNSEEN_KEY = "unseen_voice"
"""What a manifest's rows may say beside audio, duration and text."""
MAX_LISTED_BYTES = 32 << 20
"""A larger manifest is not read only to list its voices."""
AUDIO_HINT = (
    f"audio is read from {' '.join(AUDIO_SUFFIXES[:9])} and others (docs/data.md); convert what is "
    "not, as with `ffmpeg -i IN OUT.wav`"
)
"""What to tell about a file of another kind."""
_ROW = '{"audio_filepath": "a.wav", "duration": 2.4, "text": "yes"}'
_MANIFEST = f"a manifest has one object per line, {_ROW}"


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording to answer; its samples are read when their turn comes."""

    id: str
    duration_s: float
    """As declared, 0 where nothing declares it; only for order and speed."""
    text: str | None
    """The reference, or None where there is nothing to score."""
    read: Callable[[int], np.ndarray]
    """Rate in Hz -> float32 samples [S]; raises AudioError for a recording that cannot be used."""
    voice: str | None = None
    """Who speaks, where the manifest says so."""
    is_unseen: bool = False
    """Whether the manifest says that training has not heard this voice."""
    condition: str | None = None
    """How it was recorded, where the manifest says so."""
    audio_of: str | None = None
    """The utterance whose recording this one was given instead of its own, if any."""
    source: str = ""
    """Where its samples are, to tell utterances of one id apart."""


def read_inputs(inputs: str) -> list[Utterance]:
    """Lists the utterances that `inputs` means, in its own order.

    A folder with SHAR shards is SHAR, another folder its audio files by name; any other file is a
    NeMo manifest or Lhotse cuts, whichever its first line is. Raises SettingsError if there is
    nothing there, the file is of another kind or a line cannot be read.
    """
    path = Path(plain_path(inputs))
    if not os.path.exists(path):
        raise SettingsError(f"inputs: {missing(inputs)}")
    if _is_shar(path):
        utterances = _one_turn_each(read_shar(path, ManifestOptions()))
    elif (files := recordings(path)) is not None:
        utterances = files
    else:
        _refuse_other_kinds(path)
        utterances = _one_turn_each(read_manifest(path, ManifestOptions()))
    if not utterances:
        why = left_out(path)
        raise SettingsError(f"inputs: nothing to answer in {inputs!r}" + (why and f": {why}"))
    return utterances


def left_out(path: Path) -> str:
    """How many files of a folder of audio files are none that are read; empty if none are."""
    if not os.path.isdir(path) or _is_shar(path):
        return ""
    others = [p for p in path.rglob("*") if p.is_file() and not _is_audio(p)]
    counts = Counter(p.suffix.lower() or p.name for p in others if not p.name.startswith("."))
    if not counts:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    return f"files left out: {counts.total()} ({kinds}); {AUDIO_HINT}"


def missing(inputs: str) -> str:
    """Says that there is nothing of this name."""
    is_pattern = any(sign in inputs for sign in "*?[")
    hint = "; patterns are not expanded: name the folder" if is_pattern else ""
    return f"no such file or folder: {inputs!r}{hint}"


def recordings(path: Path) -> list[Utterance] | None:
    """The audio files of a folder, by name, or the one that a path names; None for another file."""
    if os.path.isdir(path):
        return [_audio_file(p, path) for p in sorted(path.rglob("*")) if _is_audio(p)]
    return [_audio_file(path, path.parent)] if _is_audio(path) else None


def voices_of(manifest: Path) -> set[str]:
    """The voices that a manifest names; none for a large one, or one that cannot be read."""
    if not manifest.is_file() or manifest.stat().st_size > MAX_LISTED_BYTES:
        return set()
    try:
        found = {
            _voice(conversation) for conversation in read_manifest(manifest, ManifestOptions())
        }
    except SettingsError:
        return set()
    return {voice for voice in found if voice is not None}


def _is_shar(path: Path) -> bool:
    return os.path.isdir(path) and any(path.glob("cuts.*"))


def _refuse_other_kinds(path: Path) -> None:
    """Raises SettingsError for a file that is neither audio that is read nor lines of JSON."""
    if path.suffix == ".gz":
        return
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(BOM_UTF8).lstrip()
    if head.startswith(b"["):
        raise SettingsError(f"inputs: {path} is a JSON list, and not a JSON object: {_MANIFEST}")
    if not head or head.startswith((b"{", BOM_UTF16_LE, BOM_UTF16_BE)):
        return
    if path.suffix in (".json", ".jsonl"):
        raise SettingsError(f"inputs: {path}: not lines of JSON: {_MANIFEST}")
    raise SettingsError(
        f"inputs: {path} is neither audio nor a manifest: {AUDIO_HINT}; {_MANIFEST}"
    )


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES and os.path.isfile(path)


def _audio_file(path: Path, root: Path) -> Utterance:
    def read(rate_hz: int) -> np.ndarray:
        return read_audio(path, sample_rate_hz=rate_hz)

    return Utterance(
        id=str(path.relative_to(root)),
        duration_s=_duration_s(path),
        text=None,
        read=read,
        source=str(path),
    )


def _duration_s(path: Path) -> float:
    """Seconds of audio; 0 for a file that cannot be read, which reading will report."""
    try:
        return audio_length(path).duration_s
    except AudioError:
        return 0.0


def _one_turn_each(conversations: Iterable[Conversation]) -> list[Utterance]:
    try:
        return [_utterance(conversation) for conversation in conversations]
    except SettingsError as error:
        raise SettingsError(f"inputs: {error}") from error


def _utterance(conversation: Conversation) -> Utterance:
    clips = conversation.clips
    if len(clips) != 1:
        raise SettingsError(
            f"{conversation.id!r} has {len(clips)} recordings; evaluation answers one at a time"
        )
    return Utterance(
        id=conversation.id,
        duration_s=clips[0].duration_s,
        text=conversation.answer,
        read=clips[0].load,
        voice=_voice(conversation),
        is_unseen=bool(conversation.fields.get(UNSEEN_KEY)),
        condition=_first_said(conversation.fields, CONDITION_KEYS),
        source=f"{clips[0].path}@{clips[0].offset_s}",
    )


def _voice(conversation: Conversation) -> str | None:
    return _first_said(conversation.fields, VOICE_KEYS)


def _first_said(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    found = (fields.get(key) for key in keys)
    return next((str(value) for value in found if value not in (None, "")), None)
