"""From an entry of `input_cfg` to conversations of text and recordings, by its type."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.input_config import DUPLEX_TYPES, S2S, SQA, InputConfig, Paths
from speechlm2_jax.data.manifest_options import ManifestOptions, SpeakerRoles
from speechlm2_jax.data.parquet import read_parquet, table_columns
from speechlm2_jax.data.paths import expand_shards
from speechlm2_jax.data.readers import read_manifest
from speechlm2_jax.data.shar import read_shar
from speechlm2_jax.data.share_gpt import PLACEHOLDERS, read_share_gpt, share_gpt
from speechlm2_jax.data.tarred import read_tarred, read_tarred_dialogs
from speechlm2_jax.data.text_readers import (
    read_sft,
    read_text_json,
    read_text_lines,
    read_text_pairs,
)
from speechlm2_jax.data.webdataset import read_share_gpt_webdataset
from speechlm2_jax.settings import SettingsError

Reader = Callable[[InputConfig, ManifestOptions], Iterator[Conversation]]


def read_entry(entry: InputConfig, options: ManifestOptions) -> Iterator[Conversation]:
    """The conversations of an entry that is no group, in order. Raises SettingsError."""
    if entry.type in DUPLEX_TYPES:
        raise SettingsError(
            f"type: {entry.type}: makes conversations of two voices, for duplex models"
        )
    return _READERS.get(entry.type, recordings)(entry, options_of_type(entry, options))


def options_of_type(entry: InputConfig, options: ManifestOptions) -> ManifestOptions:
    """How the rows of an entry become conversations, by its type."""
    if entry.type == SQA:
        return replace(options, with_question=True)
    if entry.type != S2S:
        return options
    default = SpeakerRoles()
    roles = SpeakerRoles(
        users=entry.input_roles or default.users,
        assistants=entry.output_roles or default.assistants,
        strips_timestamps=entry.strip_timestamp_tokens,
    )
    return replace(options, roles=roles)


def recordings(entry: InputConfig, options: ManifestOptions) -> Iterator[Conversation]:
    """Manifests of recordings or dialogs, whose first line tells which, in files or packed."""
    if entry.shar_path is not None:
        yield from read_shar(entry.shar_path, options)
    elif entry.tarred_audio_filepaths is not None:
        for manifests, tars in entry.tarred:
            yield from read_tarred(manifests, tars, options)
    else:
        for path in expand_shards(entry.manifests):
            yield from read_manifest(path, options)


def _share_gpt(entry: InputConfig, options: ManifestOptions) -> Iterator[Conversation]:
    placeholders = placeholders_of(entry)
    if entry.tarred_audio_filepaths is not None:
        for manifests, tars in entry.tarred:
            yield from read_tarred_dialogs(manifests, tars, options, share_gpt(placeholders))
        return
    for path in expand_shards(entry.manifests):
        yield from read_share_gpt(
            path, options, placeholders=placeholders, audio_root=entry.audio_root
        )


def _webdataset(entry: InputConfig, options: ManifestOptions) -> Iterator[Conversation]:
    placeholders = placeholders_of(entry)
    return read_share_gpt_webdataset(entry.data_dir or "", options, placeholders=placeholders)


def placeholders_of(entry: InputConfig) -> tuple[str, ...]:
    """What stands for a recording in the texts of ShareGPT."""
    return _listed(entry.audio_placeholders) or PLACEHOLDERS


def _text_pairs(entry: InputConfig, options: ManifestOptions) -> Iterator[Conversation]:
    return read_text_pairs(
        _listed(entry.source_paths),
        _listed(entry.target_paths),
        options,
        questions=entry.questions_path,
    )


def _parquet(entry: InputConfig, options: ManifestOptions) -> Iterator[Conversation]:
    return read_parquet(entry.manifests, options, table_columns(entry))


def _listed(paths: Paths | None) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths or ()


_READERS: Mapping[str, Reader] = {
    "share_gpt": _share_gpt,
    "share_gpt_webdataset": _webdataset,
    "txt": lambda entry, options: read_text_lines(_listed(entry.paths), options),
    "txt_jsonl": lambda entry, options: read_text_json(_listed(entry.paths), options),
    "txt_pair": _text_pairs,
    "nemo_sft_jsonl": lambda entry, options: read_sft(_listed(entry.paths), options),
    "parquet": _parquet,
}
"""Readers of the types that are not manifests of recordings."""
