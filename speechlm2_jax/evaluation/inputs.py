"""Inputs of an evaluation: manifests, Lhotse cuts, SHAR, `input_cfg` or audio, as utterances."""

import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from speechlm2_jax.bundled import page
from speechlm2_jax.data.audio import AudioError, audio_length, read_audio
from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.audio_suffixes import AUDIO_SUFFIXES
from speechlm2_jax.data.conversations import AudioClip, Conversation
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.paths import expand_shards, files_below, local_file, plain_path
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.data.storage.access import StorageAccess, current, using
from speechlm2_jax.data.storage.addresses import is_remote, name_of
from speechlm2_jax.data.storage.addresses import joined as joined_address
from speechlm2_jax.evaluation.dialogs import EvaluatedDialog, evaluated_dialog, joined
from speechlm2_jax.pretrained.near_paths import nearest_path
from speechlm2_jax.settings import SettingsError

VOICE_KEYS = ("voice", "speaker", "speaker_id")
CONDITION_KEYS = ("condition",)
UNSEEN_KEY = "unseen_voice"
"""Optional fields of a manifest row besides audio, duration and text."""
READ_LIMIT_S = 300.0
"""Seconds that a read of remote storage may take, as `read_timeout` of training."""
_MANIFESTS = (".json", ".jsonl", ".gz")
AUDIO_HINT = (
    f"supported audio: {' '.join(AUDIO_SUFFIXES[:9])} and others ({page('data.md')}); "
    "convert other files, as with `ffmpeg -i IN OUT.wav`"
)
"""Hint for a file of another kind."""
_ROW = '{"audio_filepath": "a.wav", "duration": 2.4, "text": "yes"}'
_MANIFEST = f"a manifest has one object per line, {_ROW}"


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording of the test set, or one conversation; `read` loads its samples."""

    id: str
    duration_s: float
    """Declared duration, 0 if unknown; only used for ordering and for RTFx."""
    text: str | None
    """The reference; None if there is none."""
    read: Callable[[int], np.ndarray]
    """Sampling rate in Hz -> float32 samples [S]. Raises AudioError."""
    voice: str | None = None
    """The speaker, if the manifest names one."""
    is_unseen: bool = False
    """Whether this voice does not occur in the training data."""
    is_seen_text: bool = False
    """Whether its reference is also a response of the training data."""
    is_seen_audio: bool = False
    """Whether its recording is also one of the training data."""
    condition: str | None = None
    """Recording condition, if the manifest names one."""
    audio_of: str | None = None
    """Id of the utterance whose recording replaces its own, if the audio is swapped."""
    source: str = ""
    """File and offset of its samples; tells utterances with equal ids apart."""
    clip: AudioClip | None = None
    """What `read` reads of one recording of a manifest; None for a file or an address, whole."""
    dialog: EvaluatedDialog | None = None
    """A conversation with turns of its own; `read` gives its recordings one after another."""


def read_inputs(
    inputs: str | Path | Sequence[str], tags: Mapping[str, object] | None = None
) -> list[Utterance]:
    """Lists the utterances of one input or of several, in their own order.

    - A folder with `cuts.*` is a SHAR directory; any other folder gives its audio files by name.
    - A YAML file holds entries as `input_cfg` has them, of any type that training reads.
    - A file is audio by its suffix, else a NeMo manifest, conversations or Lhotse cuts, by its
      first line.

    Each may be an address (`https://`, `s3://` and others), or a pattern of shards as in
    `manifest_filepath`. `tags` go to conversations that have turns of their own, as in `input_cfg`.
    Raises SettingsError if nothing is found, a file is of another kind or a line is invalid.
    """
    listed = (inputs,) if isinstance(inputs, str | Path) else inputs
    with using(StorageAccess(limit_s=READ_LIMIT_S)):
        each = (shard for one in listed for shard in shards_of(str(one)))
        return [utterance for one in each for utterance in _read_input(one, tags or {})]


def shards_of(inputs: str) -> list[str]:
    """The inputs that a pattern stands for; a path that exists is meant as it is written."""
    return [inputs] if os.path.exists(inputs) else expand_shards(inputs)


def _read_input(inputs: str, tags: Mapping[str, object]) -> list[Utterance]:
    if is_remote(inputs):
        return _read_remote(inputs, tags)
    path = Path(plain_path(inputs))
    if not os.path.exists(path):
        raise SettingsError(f"inputs: {missing(inputs)}")
    if _is_shar(path):
        utterances = _utterances(read_shar(path, ManifestOptions()))
    elif path.suffix in (".yaml", ".yml"):
        utterances = _utterances(_of_entries(inputs))
    elif (files := recordings(path)) is not None:
        utterances = files
    else:
        _refuse_other_kinds(path)
        utterances = _utterances(read_manifest(path, ManifestOptions(tags=tags)))
    if not utterances:
        why = left_out(path)
        raise SettingsError(f"inputs: no recordings in {inputs!r}" + (why and f": {why}"))
    return utterances


def _read_remote(address: str, tags: Mapping[str, object]) -> list[Utterance]:
    """The utterances of an address, by its suffix; one without a suffix is a folder."""
    try:
        suffix = PurePosixPath(name_of(address)).suffix.lower()
        if (found := remote_recordings(address)) is not None:
            utterances = found
        elif suffix in (".yaml", ".yml"):
            utterances = _utterances(_of_entries(address))
        elif suffix in _MANIFESTS:
            _refuse_other_kinds(copy := local_file(address))
            utterances = _utterances(read_manifest(copy, ManifestOptions(tags=tags)))
        else:
            utterances = _utterances(read_shar(address, ManifestOptions()))
    except SettingsError as error:
        raise SettingsError(f"inputs: {str(error).removeprefix('inputs: ')}") from error
    if not utterances:
        raise SettingsError(f"inputs: no recordings in {address!r}")
    return utterances


def remote_recordings(address: str) -> list[Utterance] | None:
    """The audio files in a remote folder, by name, or one audio file; None for SHAR and files."""
    suffix = PurePosixPath(name_of(address)).suffix.lower()
    if suffix in AUDIO_SUFFIXES:
        return [_remote_audio(address)]
    if suffix in (*_MANIFESTS, ".yaml", ".yml"):
        return None
    names = current().names(address)
    if any(name.startswith("cuts.") for name in names):
        return None
    suffixes = {name: PurePosixPath(name).suffix.lower() for name in names}
    return [
        _remote_audio(joined_address(address, name))
        for name, suffix in suffixes.items()
        if suffix in AUDIO_SUFFIXES
    ]


def _remote_audio(address: str) -> Utterance:
    """A remote recording, which is read when its turn comes: its duration is not known before."""
    location = AudioLocation(address, storage=current())
    name = name_of(address)

    def read(rate_hz: int) -> np.ndarray:
        return read_audio(location.source(name), sample_rate_hz=rate_hz)

    return Utterance(id=name, duration_s=0.0, text=None, read=read, source=address)


def left_out(path: Path) -> str:
    """Counts the files of an audio folder that are not read, as one line; empty if none."""
    if not os.path.isdir(path) or _is_shar(path):
        return ""
    others = [p for p in files_below(path) if p.is_file() and not _is_audio(p)]
    counts = Counter(p.suffix.lower() or p.name for p in others if not p.name.startswith("."))
    if not counts:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    return f"files left out: {counts.total()} ({kinds}); {AUDIO_HINT}"


def missing(inputs: str) -> str:
    """Error text for a path that does not exist, with the nearest existing path."""
    hint = ""
    if any(sign in inputs for sign in "*?["):
        hint = "; patterns are not expanded: name the folder"
    elif near := nearest_path(inputs):
        hint = f"; did you mean {near!r}?"
    return f"no such file or folder: {inputs!r}{hint}"


def recordings(path: Path) -> list[Utterance] | None:
    """The audio files of a folder, sorted by name, or one audio file; None for another file."""
    if os.path.isdir(path):
        return [_audio_file(p, path) for p in files_below(path) if _is_audio(p)]
    return [_audio_file(path, path.parent)] if _is_audio(path) else None


def _is_shar(path: Path) -> bool:
    return os.path.isdir(path) and any(path.glob("cuts.*"))


def _refuse_other_kinds(path: Path) -> None:
    """Raises SettingsError for a file that is neither audio nor JSON lines."""
    if path.suffix == ".gz":
        return
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(BOM_UTF8).lstrip()
    if head.startswith(b"["):
        raise SettingsError(f"inputs: {path} is a JSON list, not JSON lines: {_MANIFEST}")
    if not head or head.startswith((b"{", BOM_UTF16_LE, BOM_UTF16_BE)):
        return
    if path.suffix in (".json", ".jsonl"):
        raise SettingsError(f"inputs: {path} is not JSON lines: {_MANIFEST}")
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
    """Seconds of audio; 0 for a file that cannot be read (reading its samples reports it)."""
    try:
        return audio_length(path).duration_s
    except AudioError:
        return 0.0


def _utterances(conversations: Iterable[Conversation]) -> list[Utterance]:
    try:
        return [_utterance(conversation) for conversation in conversations]
    except SettingsError as error:
        raise SettingsError(f"inputs: {error}") from error


def _of_entries(path: str) -> Iterator[Conversation]:
    """The conversations of the entries in a YAML file, one entry after another."""
    from speechlm2_jax.data.config import DataLoaderConfig
    from speechlm2_jax.data.salm_dataset import SALMDataset
    from speechlm2_jax.data.sources import read_sources

    config = DataLoaderConfig(input_cfg=path, batch_size=1)
    for source in read_sources(config, "inputs", SALMDataset.read):
        yield from source.conversations


def _utterance(conversation: Conversation) -> Utterance:
    if conversation.is_dialog:
        return _dialog_utterance(conversation)
    clips = conversation.clips
    return Utterance(
        id=conversation.id,
        duration_s=clips[0].duration_s,
        text=conversation.response,
        read=clips[0].load,
        voice=voice_of(conversation),
        is_unseen=bool(conversation.fields.get(UNSEEN_KEY)),
        condition=_first_value(conversation.fields, CONDITION_KEYS),
        source=f"{clips[0].path}@{clips[0].offset_s}",
        clip=clips[0],
    )


def _dialog_utterance(conversation: Conversation) -> Utterance:
    """A conversation whose turns before the response are the prompt."""
    dialog = evaluated_dialog(conversation)
    if not dialog.turns:
        raise SettingsError(
            f"{conversation.where or conversation.id}: the conversation has no turn before the "
            "response; a response needs a turn of the user"
        )
    return Utterance(
        id=conversation.id,
        duration_s=sum(clip.duration_s for clip in dialog.clips),
        text=conversation.response,
        read=lambda rate_hz: joined(dialog.read(rate_hz)),
        voice=voice_of(conversation),
        is_unseen=bool(conversation.fields.get(UNSEEN_KEY)),
        condition=_first_value(conversation.fields, CONDITION_KEYS),
        source=conversation.where,
        dialog=dialog,
    )


def voice_of(conversation: Conversation) -> str | None:
    """Its speaker, if its row names one."""
    return _first_value(conversation.fields, VOICE_KEYS)


def _first_value(fields: Mapping[str, object], keys: tuple[str, ...]) -> str | None:
    found = (fields.get(key) for key in keys)
    return next((str(value) for value in found if value not in (None, "")), None)
