"""How the rows of one entry become conversations of two voices, by its type and its keys."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from speechlm2_jax.data.augmentation.config import AugmentationConfig
from speechlm2_jax.data.conversations import AnyConversation, AudioClip, Conversation
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.duplex.conversions import (
    TARGET,
    ContinuationOptions,
    Convert,
    OverlapOptions,
    ReverseOptions,
    continuation,
    continuation_fault,
    overlapping,
    reversed_roles,
    with_silent_agent,
)
from speechlm2_jax.data.duplex.readers import agent_clip, conversation_of_cut
from speechlm2_jax.data.duplex.variants import with_variants
from speechlm2_jax.data.input_config import (
    CONTINUATION,
    DUPLEX_TYPES,
    OVERLAP,
    REVERSE,
    TARRED_TO_DUPLEX,
    InputConfig,
)
from speechlm2_jax.data.lhotse_types import Cut
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.shar import RECORDING, SharCut
from speechlm2_jax.settings import SettingsError

_PLAIN = ("lhotse_as_conversation", "lhotse", "lhotse_shar")
_SILENCE_S = -0.08
_LENGTHS = (
    *("truncate_duration", "truncate_offset_type", "keep_excessive_supervisions"),
    *("pad_min_duration", "pad_direction"),
)
"""Settings that change lengths, but not how many conversations there are."""
Options = TypeVar("Options", OverlapOptions, ReverseOptions, ContinuationOptions)


@dataclass(frozen=True, kw_only=True)
class DuplexForm:
    """How the rows of an entry become conversations of two voices; another process can have it."""

    type: str
    """That of the entry."""
    channel: int | None = None
    """Of users' recordings with several, where a cut names none; None: the mean."""
    options: OverlapOptions | ReverseOptions | ContinuationOptions | None = None
    """The keys of the type."""
    silence_s: float = _SILENCE_S
    """Of `nemo_tarred_to_duplex`: seconds of the agent's turn (`with_silent_agent`)."""
    sample_rate_hz: int = 16000
    """Of the same: what frames are counted by."""
    has_agent: bool = True
    """Whether the agent's recordings are read; those of types that make the user's of them are."""
    lengths: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Truncation and padding of what an index has."""

    @property
    def reads_cuts(self) -> bool:
        """Whether rows are Lhotse cuts, else those of recordings and their texts."""
        return self.type != TARRED_TO_DUPLEX

    @property
    def fields(self) -> tuple[str, ...]:
        """The recordings of a cut."""
        if self.type == CONTINUATION:
            return (TARGET,)
        return (RECORDING, TARGET) if self.has_agent else (RECORDING,)

    @property
    def key(self) -> list[Any]:
        """What lengths and turns depend on, beside the rows."""
        options = None if self.options is None else asdict(self.options)
        lengths = {name: getattr(self.lengths, name) for name in _LENGTHS}
        return [self.type, options, self.silence_s, self.sample_rate_hz, lengths]

    def fault(self, cut: Cut) -> str | None:
        """Why settings leave a cut out, by the cause; None if they do not."""
        if isinstance(self.options, ContinuationOptions):
            return continuation_fault(cut, self.options)
        return None

    def of_cut(self, one: SharCut) -> DuplexConversation | None:
        """The conversation of a cut; None for one that is left out. Raises SettingsError."""
        if self.fault(one.cut) is not None:
            return None
        if isinstance(self.options, ContinuationOptions):
            made = continuation(one.cut, _whole_agent(one), self.options)
        else:
            made = conversation_of_cut(one, self.channel, has_agent=self.has_agent)
            convert = self._convert()
            made = made if convert is None else convert(one.cut, made)
        return made and replace(made, where=one.where, shard=one.shard)

    def of_recording(self, conversation: Conversation) -> DuplexConversation:
        """A recording and its text as a user, beside an agent who stays silent."""
        return with_silent_agent(conversation, self.silence_s, self.sample_rate_hz)

    def finished(self, made: AnyConversation) -> DuplexConversation:
        """What a row of an index becomes: truncated and padded."""
        if isinstance(made, Conversation):
            made = self.of_recording(made)
        assert isinstance(made, DuplexConversation)
        (one,) = with_variants([made], self.lengths)
        return one

    def _convert(self) -> Convert | None:
        if isinstance(self.options, OverlapOptions):
            return overlapping(self.options)
        return reversed_roles(self.options) if isinstance(self.options, ReverseOptions) else None


def form_of(
    entry: InputConfig, config: DuplexLoaderConfig, *, has_agent: bool = True
) -> DuplexForm:
    """How the rows of an entry become conversations. Raises SettingsError for other types.

    Without `has_agent` a model has no use for the agent's recordings.
    """
    own, is_tarred = entry.agent_silence_duration, entry.type == TARRED_TO_DUPLEX
    is_other = entry.type not in (*_PLAIN, *DUPLEX_TYPES)
    if not is_tarred and (entry.manifest_filepath is not None or is_other):
        raise SettingsError(
            "duplex data are Lhotse cuts with target_audio: give cuts_path or shar_path "
            f"(type: lhotse or lhotse_shar, or {', '.join(DUPLEX_TYPES)})"
        )
    return DuplexForm(
        type=entry.type,
        channel=_channel(config),
        options=_options_of(entry, config),
        silence_s=_SILENCE_S if own is None else own,
        sample_rate_hz=config.sample_rate,
        has_agent=has_agent or entry.type in (REVERSE, CONTINUATION),
        lengths=AugmentationConfig(**{name: getattr(config, name) for name in _LENGTHS}),
    )


def recording_options(entry: InputConfig, config: DuplexLoaderConfig) -> ManifestOptions:
    """How rows of recordings and their texts are read, before an agent is set beside them."""
    return ManifestOptions(
        text_field=entry.text_field or "text",
        channel=_channel(config),
        skip_missing=entry.skip_missing_manifest_entries or config.skip_missing_manifest_entries,
    )


def _channel(config: DuplexLoaderConfig) -> int | None:
    return config.channel_selector if isinstance(config.channel_selector, int) else None


def _options_of(
    entry: InputConfig, config: DuplexLoaderConfig
) -> OverlapOptions | ReverseOptions | ContinuationOptions | None:
    if entry.type == OVERLAP:
        return _options(OverlapOptions, entry)
    if entry.type == REVERSE:
        return _options(ReverseOptions, entry)
    if entry.type == CONTINUATION:
        given = (entry.shard_seed, config.shard_seed, config.seed)
        seed = next((one for one in given if isinstance(one, int)), 0)
        return _options(ContinuationOptions, entry, seed)
    return None


def _options(cls: type[Options], entry: InputConfig, seed: int | None = None) -> Options:
    """The keys of a type, as far as the entry gives them."""
    given: dict[str, Any] = {f.name: getattr(entry, f.name, None) for f in fields(cls)}
    given["seed"] = seed
    return cls(**{name: value for name, value in given.items() if value is not None})


def _whole_agent(one: SharCut) -> AudioClip:
    """The whole of a cut's `target_audio`, packed or in a file."""
    clip = agent_clip(one)
    target = one.cut.custom[TARGET]
    return replace(clip, offset_s=0.0, duration_s=float(target.duration), is_segment=False)
