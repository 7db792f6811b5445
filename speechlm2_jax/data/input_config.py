"""Settings of one entry of `input_cfg`: what is read, and as what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from speechlm2_jax.settings import Refusal, SettingsError, join, report_ignored

Paths = str | tuple[str, ...]
ManifestPaths = str | tuple[str | tuple[str, ...] | tuple[str, float], ...]
"""A path; paths; or NeMo's `[[a], [b]]`, of which all or none may have a weight: `[a, 2]`."""
TarPaths = str | tuple[str | tuple[str, ...], ...]
"""A path; paths; or NeMo's `[[a], [b]]`."""
SharPath = str | tuple[str | tuple[str, float], ...] | Mapping[str, Paths]
"""A folder; folders, all or none with a weight; or the files of each field, `cuts` among them."""

DEFAULT_TYPE = "lhotse_as_conversation"
GROUP = "group"
SQA, S2S = "sqa_as_conversation", "s2s_as_conversation"
OVERLAP, REVERSE = "s2s_duplex_overlap_as_s2s_duplex", "s2s_duplex_reverse_role"
CONTINUATION, TARRED_TO_DUPLEX = "lhotse_magpietts_data_as_continuation", "nemo_tarred_to_duplex"
DUPLEX_TYPES = (OVERLAP, REVERSE, CONTINUATION, TARRED_TO_DUPLEX)
"""Types that make conversations of two voices."""
_RECORDINGS = ("cuts_path", "manifest_filepath", "shar_path")
_ANY = (*_RECORDINGS, "input_cfg")
_TEXTS = ("txt", "txt_jsonl", "txt_pair", "nemo_sft_jsonl")
SOURCES: Mapping[str, tuple[str, ...]] = {
    DEFAULT_TYPE: _ANY,
    "lhotse": _RECORDINGS,
    "lhotse_shar": _RECORDINGS,
    "nemo": _RECORDINGS,
    "nemo_tarred": ("manifest_filepath",),
    "multimodal_conversation": _RECORDINGS,
    "share_gpt": ("manifest_filepath",),
    "share_gpt_webdataset": ("data_dir",),
    S2S: _ANY,
    SQA: _ANY,
    "txt": ("paths",),
    "txt_jsonl": ("paths",),
    "txt_pair": ("source_paths",),
    "nemo_sft_jsonl": ("paths",),
    "parquet": ("manifest_filepath",),
    OVERLAP: _ANY,
    REVERSE: _ANY,
    CONTINUATION: _ANY,
    TARRED_TO_DUPLEX: ("manifest_filepath",),
    GROUP: ("input_cfg",),
}
"""Each type that is read -> the keys that tell where, one of which is given."""
READ_TYPES = tuple(SOURCES)
PLAIN_TYPES = ("lhotse", "lhotse_shar", "nemo", "nemo_tarred")
"""Recordings with their texts, which an entry of another type may be made of."""
ENDLESS_TYPES = (
    "multimodal_conversation",
    "share_gpt",
    "share_gpt_webdataset",
    "parquet",
    *_TEXTS,
)
"""Types that NeMo repeats without end, whether packed or not."""
LINE_TYPES = (
    *(DEFAULT_TYPE, S2S, SQA, *PLAIN_TYPES, "multimodal_conversation", "share_gpt"),
    *("txt", "txt_jsonl", "nemo_sft_jsonl", *DUPLEX_TYPES),
)
"""Types whose examples are lines of files, so that a large file can have an index."""
REFUSED_TYPES: Mapping[str, str] = {
    "multi_speaker_simulator": "mixtures of speakers are data of speaker models; mix the "
    "recordings ahead of time",
}
"""NeMo's other types -> why they are refused."""
_TARRED = (
    *(DEFAULT_TYPE, SQA, *PLAIN_TYPES),
    *("multimodal_conversation", "share_gpt", TARRED_TO_DUPLEX),
)
_ONE_VOICE = tuple(kind for kind in READ_TYPES if kind not in DUPLEX_TYPES)
_WITH_PROMPT = tuple(kind for kind in _ONE_VOICE if kind not in _TEXTS)
_TURNS_OF_FILE = ("share_gpt", "share_gpt_webdataset", *_TEXTS)
_TURNS_OF_TAGS = ("context", "system_prompt")
KEY_TYPES: Mapping[str, tuple[str, ...]] = {
    "tarred_audio_filepaths": _TARRED,
    "skip_missing_manifest_entries": _TARRED,
    "target_paths": ("txt_pair",),
    "questions_path": ("txt_pair",),
    "audio_placeholders": ("share_gpt", "share_gpt_webdataset"),
    "audio_root": ("share_gpt",),
    "input_roles": (S2S,),
    "output_roles": (S2S,),
    "strip_timestamp_tokens": (S2S,),
    "audio_field": ("parquet",),
    "duration_field": ("parquet",),
    "agent_roles": (OVERLAP, REVERSE),
    "user_roles": (REVERSE,),
    "target_agent_name": (REVERSE,),
    "target_user_name": (REVERSE,),
    "move_agent_text_back_by": (OVERLAP,),
    "filter_samples_starting_with_agent": (OVERLAP,),
    "agent_silence_duration": (TARRED_TO_DUPLEX,),
    "add_extra_end_silence": (CONTINUATION,),
    "extra_end_silence_range": (CONTINUATION,),
    "max_cer": (CONTINUATION,),
    "min_context_speaker_similarity": (CONTINUATION,),
    "target_speaker": (CONTINUATION,),
    "sample_rate": (CONTINUATION,),
    "tags": _ONE_VOICE,
    "shard_seed": (
        *(DEFAULT_TYPE, "lhotse", "lhotse_shar", "nemo", "multimodal_conversation"),
        *(SQA, S2S, OVERLAP, REVERSE, CONTINUATION, "txt_pair"),
    ),
    "audio_locator_tag": _WITH_PROMPT,
    "token_equivalent_duration": _WITH_PROMPT,
    "text_field": (DEFAULT_TYPE, *PLAIN_TYPES, "txt_jsonl", "parquet", TARRED_TO_DUPLEX),
}
"""A key that some types alone read -> these types; a group passes it on to its entries."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """One entry of `input_cfg`: a manifest, or a group of entries."""

    type: str = DEFAULT_TYPE
    """What is read (docs/data.md has a table)."""
    # where it is
    cuts_path: Paths | None = None
    manifest_filepath: ManifestPaths | None = None
    """A path; several, `[a, b]` or NeMo's `[[a], [b]]`; or with weights, `[[a, 2], [b, 1]]`."""
    tarred_audio_filepaths: TarPaths | None = None
    """Of `manifest_filepath`: the tars with its recordings, spelt in the same form."""
    skip_missing_manifest_entries: bool | None = None
    """Of tars: leaves out members without a row, and rows without a member."""
    shar_path: SharPath | None = None
    """A folder; folders, or [folder, weight] pairs; or the files of each field, as Lhotse has it:
    `cuts`, `recording` and, of duplex data, `target_audio`."""
    input_cfg: "str | tuple[InputConfig, ...] | None" = None
    """The entries of a group, or the path of a YAML file with them. With `lhotse_as_conversation`
    its entries are read as this type, with its tags."""
    data_dir: str | None = None
    """Of `share_gpt_webdataset`: a folder of tars."""
    paths: Paths | None = None
    """Of texts: a path, paths, or a pattern of shards."""
    source_paths: Paths | None = None
    """Of `txt_pair`: files of the user's lines."""
    target_paths: Paths | None = None
    """Of `txt_pair`: files of the responses, line by line."""
    questions_path: str | None = None
    """Of `txt_pair`: a file of which a line, drawn by `shard_seed`, comes before each source. With
    `prompt_format: llama2` of the data set it is the system turn, as in NeMo."""
    audio_root: str | None = None
    """Of `share_gpt`: the folder of relative paths; null: that of the manifest."""
    # as what
    weight: float | None = None
    """Share of this entry among its neighbours; given to all of them or to none."""
    tags: Mapping[str, object] = field(default_factory=dict)
    """Fields for every conversation of the entry, before the manifest's own; `context` opens the
    user's turn and `system_prompt` the dialog. Those of a group are fields alone, as in NeMo."""
    audio_locator_tag: str | None = None
    token_equivalent_duration: float | None = None
    text_field: str | None = None
    shard_seed: int | str | None = None
    """Of the order of SHAR's shards and of drawn questions, where it is not the data set's."""
    audio_placeholders: Paths | None = None
    """Of `share_gpt`: what stands for a recording in a text; null: `<sound>` and `<speech>`."""
    input_roles: tuple[str, ...] | None = None
    """Of `s2s_as_conversation`: speakers who are the user; null: `user`, `User`."""
    output_roles: tuple[str, ...] | None = None
    """Of `s2s_as_conversation`: speakers who are the assistant; null: `assistant`, `Assistant`,
    `agent`, `Agent`."""
    strip_timestamp_tokens: bool = True
    """Of `s2s_as_conversation`: removes `<|12|>` from responses."""
    agent_roles: tuple[str, ...] | None = None
    """Of `s2s_duplex_reverse_role`: speakers who become the user, in any letter case; null:
    `agent`, `assistant`. Of `s2s_duplex_overlap_as_s2s_duplex`: names of the agent."""
    user_roles: tuple[str, ...] | None = None
    """Of `s2s_duplex_reverse_role`: speakers who become the agent; null: `user`."""
    target_agent_name: str | None = None
    """Of `s2s_duplex_reverse_role`: the name of the new agent; null: `agent`."""
    target_user_name: str | None = None
    """Of `s2s_duplex_reverse_role`: the name of the new user; null: `user`."""
    move_agent_text_back_by: float | None = None
    """Of `s2s_duplex_overlap_as_s2s_duplex`: seconds by which the agent's turns begin earlier."""
    filter_samples_starting_with_agent: bool | None = None
    """Of `s2s_duplex_overlap_as_s2s_duplex`: leaves out conversations that the agent opens."""
    agent_silence_duration: float | None = None
    """Of `nemo_tarred_to_duplex`: seconds of silence behind the user, the agent's turn; if
    negative, so much of the user's end is; null: -0.08."""
    add_extra_end_silence: bool | None = None
    """Of `lhotse_magpietts_data_as_continuation`: silence behind the agent, drawn once by the seed
    and the cut's id."""
    extra_end_silence_range: tuple[float, float] | None = None
    """Of `lhotse_magpietts_data_as_continuation`: its seconds; null: 0.5 to 6."""
    max_cer: float | None = None
    """Of `lhotse_magpietts_data_as_continuation`: greatest `cer` of a supervision; null: 0.03."""
    min_context_speaker_similarity: float | None = None
    """Of `lhotse_magpietts_data_as_continuation`: least similarity; null: 0.6."""
    target_speaker: str | None = None
    """Of `lhotse_magpietts_data_as_continuation`: a part of the speaker's name."""
    sample_rate: int | None = None
    """Of `lhotse_magpietts_data_as_continuation`: Hertz of the recordings; null: 22050."""
    audio_field: str = "audio"
    """Of `parquet`: the column of recordings."""
    duration_field: str = "duration"
    """Of `parquet`: the column of their seconds; without it headers are read at start-up."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "lang_field": "the language of a transcript plays no part in the prompt",
        "shuffle": "order is the data set's: set train_ds.shuffle",
        "max_open_streams": "every manifest is read once, at start-up",
        "force_finite": "validation is finite and training is not",
        "force_map_dataset": "there is one kind of data set",
        "force_iterable_dataset": "there is one kind of data set",
        "metadata_only": "manifests are read without their audio",
        "slice_length": "order is shuffled over whole manifests",
        "language": "the language of a text plays no part in the prompt",
        "source_language": "the language of a text plays no part in the prompt",
        "target_language": "the language of a text plays no part in the prompt",
        "questions_language": "the language of a text plays no part in the prompt",
        "sampling_rate": "recordings in Parquet tell their own rate, as in NeMo",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "extra_fields": "write the fields into the manifest",
        "reweight_temperature": "give it beside the outermost input_cfg, one value for each level",
    }

    @classmethod
    def check_first(cls, values: Mapping[str, object], where: str) -> None:
        """Raises SettingsError for a type that is not read, and reports keys it does not read."""
        kind = str(values.get("type") or DEFAULT_TYPE)
        if kind in REFUSED_TYPES:
            raise SettingsError(f"{join(where, 'type')}: {kind!r}: {REFUSED_TYPES[kind]}")
        if kind not in READ_TYPES:
            raise SettingsError(
                f"{join(where, 'type')}: unknown type {kind!r}; expected one of "
                f"{', '.join(READ_TYPES)}"
            )
        for key, value in values.items():
            types = KEY_TYPES.get(key)
            if types is not None and value is not None and kind not in (*types, GROUP):
                report_ignored(join(where, key), f"type {kind} does not read it")
        tags = values.get("tags")
        for key in _TURNS_OF_TAGS:
            if kind in _TURNS_OF_FILE and isinstance(tags, Mapping) and key in tags:
                reason = f"the turns of type {kind} are those of the file; the tag is a field"
                report_ignored(join(where, f"tags.{key}"), reason)

    def __post_init__(self) -> None:
        expected = SOURCES[self.type]
        given = [key for key in expected if getattr(self, key)]
        others = {key for keys in SOURCES.values() for key in keys} - set(expected)
        wrong = sorted(key for key in others if getattr(self, key))
        if wrong == ["input_cfg"]:
            raise ValueError("input_cfg inside input_cfg goes with type: group")
        if wrong or len(given) != 1:
            one = "exactly one of " if len(expected) > 1 else ""
            not_read = f", not {', '.join(wrong)}" if wrong else ""
            raise ValueError(f"type: {self.type}: give {one}{', '.join(expected)}{not_read}")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")
        self._check_paths()

    def _check_paths(self) -> None:
        if isinstance(self.shar_path, Mapping) and not self.shar_path.get("cuts"):
            raise ValueError("shar_path: the files of `cuts` are missing among its fields")
        key = "manifest_filepath" if self.shar_path is None else "shar_path"
        weights = [weight for _, weight in self.weighted]
        if weights and len(weights) != len(getattr(self, key) or ()):
            raise ValueError(f"{key}: give a weight to every path or to none")
        if weights and not min(weights) > 0:
            raise ValueError(f"{key}: weights must be positive, got {weights}")
        if self.type == "nemo_tarred" and self.tarred_audio_filepaths is None:
            raise ValueError("type: nemo_tarred: give tarred_audio_filepaths, or type: nemo")
        if self.type == "txt_pair" and not self.target_paths:
            raise ValueError("type: txt_pair: give target_paths with source_paths")
        if self.tarred_audio_filepaths is not None and self.manifest_filepath is None:
            raise ValueError("tarred_audio_filepaths: give manifest_filepath with it")
        if isinstance(self.manifest_filepath, tuple) and self.tarred_audio_filepaths is not None:
            tars = self.tarred_audio_filepaths
            if isinstance(tars, str) or len(tars) != len(self.manifest_filepath):
                raise ValueError(
                    "tarred_audio_filepaths: give a list of as many as manifest_filepath has"
                )

    @property
    def weighted(self) -> tuple[tuple[str, float], ...]:
        """The paths that have a weight of their own (`[[path, weight], ...]`), and it."""
        paths = self.manifest_filepath if self.shar_path is None else self.shar_path
        pairs = paths if isinstance(paths, tuple) else ()
        return tuple(
            (str(one[0]), float(one[1]))
            for one in pairs
            if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], int | float)
        )

    @property
    def manifests(self) -> tuple[str, ...]:
        """The paths of `cuts_path` or `manifest_filepath`, one after another."""
        return _flat(self.cuts_path or self.manifest_filepath or ())

    @property
    def line_files(self) -> tuple[str, ...]:
        """The files of whose lines each is an example; none of what is packed or no lines."""
        is_packed = self.shar_path is not None or self.tarred_audio_filepaths is not None
        if is_packed or self.type not in LINE_TYPES:
            return ()
        return self.manifests or _flat(self.paths or ())

    @property
    def has_shards(self) -> bool:
        """Whether its examples are lines of manifests, and their recordings members of tars."""
        is_packed = self.shar_path is not None or self.tarred_audio_filepaths is not None
        return is_packed and self.type in LINE_TYPES

    @property
    def tarred(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """Manifests and the tars of their recordings: each a path, paths, or a pattern."""
        tars = self.tarred_audio_filepaths or ()
        if isinstance(self.manifest_filepath, tuple):
            pairs = zip(self.manifest_filepath, tars, strict=True)
            return tuple((_flat((manifest,)), _flat((tar,))) for manifest, tar in pairs)
        return ((self.manifests, _flat(tars)),)


def own_keys(kind: str) -> tuple[str, ...]:
    """The keys that tell how a type makes conversations, and that no plain type has."""
    return tuple(
        key
        for key, types in KEY_TYPES.items()
        if kind in types and not set(types) & set(PLAIN_TYPES)
    )


def _flat(paths: ManifestPaths | TarPaths) -> tuple[str, ...]:
    listed = (paths,) if isinstance(paths, str) else paths
    nested = [(one,) if isinstance(one, str) else one for one in listed]
    return tuple(path for one in nested for path in one if isinstance(path, str))
