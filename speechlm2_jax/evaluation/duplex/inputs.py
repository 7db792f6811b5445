"""Inputs of a duplex evaluation: conversations of Lhotse cuts or SHAR, or plain recordings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechlm2_jax.batches import DuplexExample
from speechlm2_jax.data.blocks import named_sets
from speechlm2_jax.data.duplex.config import DuplexDataConfig, DuplexLoaderConfig
from speechlm2_jax.data.duplex.contents import check_roles
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.duplex.readers import read_duplex
from speechlm2_jax.data.paths import local_file, plain_path
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.data.storage.addresses import is_remote, name_of
from speechlm2_jax.evaluation.inputs import (
    AUDIO_HINT,
    READ_LIMIT_S,
    Utterance,
    left_out,
    missing,
    recordings,
    remote_recordings,
    shards_of,
)
from speechlm2_jax.settings import SettingsError, build

_SUFFIXES = (".gz", ".jsonl", ".json")
_MANIFESTS = (*_SUFFIXES, ".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation of a test set; `example` reads its audio."""

    set_name: str
    source: DuplexConversation | Utterance
    """A recorded conversation with both sides, or a recording of the user alone."""
    sample_rate_hz: int | None = None
    """Intermediate rate to which the user's audio is resampled first; None: none."""

    @property
    def id(self) -> str:
        """Its id within the set."""
        return self.source.id

    @property
    def duration_s(self) -> float:
        """Declared duration; 0 if unknown."""
        return self.source.duration_s

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference for the agent's side."""
        return isinstance(self.source, DuplexConversation)

    def example(self, dataset: DuplexS2SDataset) -> DuplexExample:
        """Reads the audio. Raises AudioError."""
        if isinstance(self.source, DuplexConversation):
            return dataset.example(self.source, self.sample_rate_hz)
        no_tokens = np.zeros(0, np.int32)
        audio = self.source.read(dataset.source_sample_rate)
        dataset.check_length(self.id, audio)
        return DuplexExample(
            id=self.id,
            source_audio=audio,
            target_audio=np.zeros(0, np.float32),
            target_tokens=no_tokens,
            source_tokens=no_tokens,
        )


def sets_of_run(data: Mapping[str, object]) -> list[Dialogue]:
    """The validation sets of a run's `data` block.

    Raises SettingsError if there are none, or one cannot be read.
    """
    config = build(DuplexDataConfig, data, "data")
    found = []
    for name, (values, where) in named_sets(config.validation_ds, "validation_ds").items():
        loader = build(DuplexLoaderConfig, values, where)
        for source in read_sources(loader, where, DuplexS2SDataset.read):
            found += [
                Dialogue(set_name=name, source=c, sample_rate_hz=loader.sample_rate)
                for c in source.conversations
            ]
    if not found:
        raise SettingsError(
            "inputs: the run has no validation sets; name Lhotse cuts, a SHAR directory or audio "
            "files, inputs=PATH"
        )
    return found


def read_dialogues(inputs: Sequence[str], sample_rate_hz: int | None) -> list[Dialogue]:
    """Lists the conversations of each path; each path is a set of its own.

    A folder with `cuts.*` is a SHAR directory, any other folder gives its audio files, or without
    audio files its manifests, a set each. A file is audio or Lhotse cuts. Raises SettingsError if
    nothing is found or something cannot be read.
    """
    found: list[Dialogue] = []
    names: set[str] = set()
    for value in (file for one in inputs for file in _files_of(one)):
        path = Path(value if is_remote(value) else plain_path(value))
        if not is_remote(value) and not os.path.exists(path):
            raise SettingsError(f"inputs: {missing(value)}")
        stem = name_of(value).partition(".")[0] if is_remote(value) else _stem(path)
        name = _unused(stem, names)
        names.add(name)
        with using(StorageAccess(limit_s=READ_LIMIT_S)):
            sources = _read_sources(value if is_remote(value) else path)
        if not sources:
            why = left_out(path)
            raise SettingsError(f"inputs: no recordings in {value!r}" + (why and f": {why}"))
        rate = sample_rate_hz
        found += [Dialogue(set_name=name, source=source, sample_rate_hz=rate) for source in sources]
    return found


def _files_of(value: str) -> list[str]:
    """What an input stands for: the shards of a pattern, the manifests of a folder of manifests."""
    found: list[str] = []
    for one in shards_of(value):
        path = Path(one if is_remote(one) else plain_path(one))
        is_folder = not is_remote(one) and path.is_dir() and not any(path.glob("cuts.*"))
        inside = sorted(path.glob("*.jsonl*")) if is_folder else []
        found += [str(file) for file in inside] if inside and not recordings(path) else [one]
    return found


def check_speakers(
    dialogues: Sequence[Dialogue], input_roles: Sequence[str], output_roles: Sequence[str]
) -> None:
    """Raises SettingsError for a speaker in neither role list."""
    sources = [d.source for d in dialogues if isinstance(d.source, DuplexConversation)]
    check_roles(sources, input_roles, output_roles, "inputs", block="")


def _read_sources(path: Path | str) -> Sequence[DuplexConversation | Utterance]:
    """What a path holds, or an address (text)."""
    try:
        if isinstance(path, str):
            return _read_remote(path)
        if os.path.isdir(path) and any(path.glob("cuts.*")):
            return list(read_duplex(path))
        if (files := recordings(path)) is not None:
            return files
        if path.suffix not in _MANIFESTS:
            raise SettingsError(f"{path} is neither audio nor Lhotse cuts: {AUDIO_HINT}")
        return list(read_duplex(None, [path]))
    except SettingsError as error:
        raise SettingsError(f"inputs: {error}") from error


def _read_remote(address: str) -> Sequence[DuplexConversation | Utterance]:
    if (files := remote_recordings(address)) is not None:
        return files
    if name_of(address).endswith(_MANIFESTS):
        return list(read_duplex(None, [local_file(address)]))
    return list(read_duplex(address))


def _stem(path: Path) -> str:
    name = path.resolve().name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name if path.is_dir() or name != path.name else path.stem


def _unused(name: str, taken: set[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
