"""Examples of a duplex model: two audio streams and two text channels, one token per frame."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.batches import DuplexExample, FrameCount
from speechlm2_jax.data.audio import AudioError, resample
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.duplex.config import DuplexDataConfig, DuplexLoaderConfig
from speechlm2_jax.data.duplex.contents import DuplexContents, speaker_counts
from speechlm2_jax.data.duplex.conversations import (
    ChannelIds,
    DuplexConversation,
    FrameGrid,
    SpokenTurn,
    text_channel,
)
from speechlm2_jax.data.duplex.entry_readers import read_duplex_entry
from speechlm2_jax.data.duplex.forms import form_of, recording_options
from speechlm2_jax.data.duplex.indexed import DuplexRowMeasures
from speechlm2_jax.data.duplex.readers import duplex_conversation
from speechlm2_jax.data.duplex.variants import at_place, with_variants
from speechlm2_jax.data.index.contents import IndexedRows, Part
from speechlm2_jax.data.index.entries import open_rows
from speechlm2_jax.data.index.list_rows import ListRows
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.lhotse_types import Cut
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError
from speechlm2_jax.settings import SettingsError, build

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ClipEffects, ExampleEffects


class DuplexS2SDataset:
    """Turns conversations of two voices into examples.

    Args:
        tokenizer: with begin and end tokens.
        frame_length: seconds of a frame.
        source_sample_rate: Hertz of the user's audio, the speech encoder's.
        target_sample_rate: Hertz of the agent's audio, the codec's.
        input_roles: speakers that are the user, spelt exactly so; `user` if absent.
        output_roles: speakers that are the agent, spelt exactly so; `agent` if absent.
        max_frames: frames of the longest conversation that the model supports
            (`model.max_frames`); None for any.

    Raises TokenizerError if the tokenizer has no begin or end token.
    """

    data_config = DuplexDataConfig
    loader_config = DuplexLoaderConfig
    own_keys: ClassVar[tuple[str, ...]] = (
        *("frame_length", "source_sample_rate", "target_sample_rate"),
        *("input_roles", "output_roles"),
    )
    """Keys of the `data` block that are arguments."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        frame_length: float,
        source_sample_rate: int,
        target_sample_rate: int,
        input_roles: Iterable[str] | None = None,
        output_roles: Iterable[str] | None = None,
        max_frames: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.frame_length = float(frame_length)
        self.source_sample_rate = source_sample_rate
        self.target_sample_rate = target_sample_rate
        self.input_roles = ("user",) if input_roles is None else tuple(input_roles)
        self.output_roles = ("agent",) if output_roles is None else tuple(output_roles)
        self.max_frames = max_frames
        self.pad_id = tokenizer.pad_id
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise TokenizerError(
                f"tokenizer {tokenizer.name} has no begin or no end token, which open and close a "
                "turn; add them: tokenizer.add_special_tokens({'bos_token': ..., 'eos_token': ...})"
            )
        self._ids = ChannelIds(bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=self.pad_id)

    @classmethod
    def from_config(
        cls, data: Mapping[str, object], tokenizer: Tokenizer, max_frames: int | None = None
    ) -> "DuplexS2SDataset":
        """Makes one of the keys of a `data` block. Raises SettingsError for a missing one."""
        config = build(DuplexDataConfig, data, "data")
        values = {name: getattr(config, name) for name in cls.own_keys}
        for name, value in values.items():
            if value is None and not name.endswith("_roles"):
                raise SettingsError(f"data.{name}: required for a duplex model")
        return cls(tokenizer, **values, max_frames=max_frames)

    def check(self, config: DuplexDataConfig, where: str) -> None:
        """Raises SettingsError if the `data` block differs from the dataset's own values."""
        for name in self.own_keys:
            given, own = getattr(config, name), getattr(self, name)
            if given not in (None, own):
                raise SettingsError(f"{where}.{name}: {given}, but the dataset was made with {own}")

    @staticmethod
    def read(entry: InputConfig, config: DuplexLoaderConfig) -> list[DuplexConversation]:
        """The conversations of one entry of `input_cfg`. Raises SettingsError."""
        return list(read_duplex_entry(entry, config))

    def index(self, entry: InputConfig, config: DuplexLoaderConfig) -> IndexedRows | None:
        """The same, read when they are asked for; None of what has no index.

        Builds the indexes of the manifests where they are missing. Raises SettingsError.
        """
        form, options = form_of(entry, config), recording_options(entry, config)
        return open_rows(entry, options, speaker_counts(self, config.sample_rate), form)

    def list_rows(
        self, conversations: Sequence[DuplexConversation], config: DuplexLoaderConfig, where: str
    ) -> ListRows:
        """A list beside indexes: its columns."""
        return ListRows.of(conversations, speaker_counts(self, config.sample_rate), frozenset())

    def row_measures(
        self, parts: Sequence[Part], config: DuplexLoaderConfig, frame_count: FrameCount, where: str
    ) -> DuplexRowMeasures:
        """What measures the rows of a large data set. Raises SettingsError as `contents`."""
        return DuplexRowMeasures.of(self, config, parts, frame_count, where)

    @staticmethod
    def variants(
        conversations: Sequence[DuplexConversation], config: DuplexLoaderConfig
    ) -> Sequence[DuplexConversation]:
        """The examples that augmentation makes of conversations: cut off, in windows, padded."""
        if isinstance(conversations, IndexedRows):
            return conversations  # each row is made so when it is read
        return with_variants(conversations, config)

    def contents(
        self,
        conversations: Sequence[DuplexConversation],
        config: DuplexLoaderConfig,
        frame_count: FrameCount,
        where: str,
    ) -> DuplexContents:
        """Measures.

        Raises SettingsError for speakers that are in neither role, and for a model that makes
        another number of frames of the user's audio than `frame_length` does.
        """
        return DuplexContents.of(self, conversations, config, frame_count, where)

    def example(
        self,
        conversation: DuplexConversation,
        sample_rate_hz: int | None = None,
        effects: "ExampleEffects | None" = None,
    ) -> DuplexExample:
        """Reads the audio of a conversation and writes its text channels.

        The user's audio is resampled to `sample_rate_hz` first, and frames are counted at that
        rate; None keeps the recording's rate. Raises AudioError if a recording cannot be used or
        is longer than `max_frames`.

        `effects` are the random changes of the user's samples in one epoch.
        """
        on_user = effects and effects.of_clip(0)
        conversation = at_place(conversation, on_user.place() if on_user else 0.0)
        rate_hz = conversation.sample_rate_hz if sample_rate_hz is None else sample_rate_hz
        grid = FrameGrid(frame_length_s=self.frame_length, sample_rate_hz=rate_hz)
        frames = grid.frame(conversation.duration_s)
        user_turns = conversation.turns_of(frozenset(self.input_roles))
        agent_turns = conversation.turns_of(frozenset(self.output_roles))
        source_audio = clip_audio(conversation.source, rate_hz, self.source_sample_rate, on_user)
        self.check_length(conversation.id, source_audio, frames)
        return DuplexExample(
            id=conversation.id,
            source_audio=source_audio,
            target_audio=clip_audio(
                conversation.target, None, self.target_sample_rate, effects and effects.of_agent()
            ),
            target_tokens=self._channel(agent_turns, frames, grid),
            source_tokens=self._channel(user_turns, frames, grid),
            target_text=" ".join(turn.text for turn in agent_turns),
            source_text=" ".join(turn.text for turn in user_turns),
        )

    def check_length(self, name: str, audio: Float[np.ndarray, " S"], frames: int = 0) -> None:
        """Raises AudioError if a user's audio, or its text, lasts more than `max_frames`."""
        lasts = math.ceil(round(len(audio) / self.source_sample_rate / self.frame_length, 6))
        if self.max_frames is not None and max(frames, lasts) > self.max_frames:
            raise AudioError(
                f"{name}: {max(frames, lasts)} frames, but the model's speech decoder has "
                f"{self.max_frames} learnt positions "
                "(model.speech_decoder.max_length_causal_mask); cut the recording",
                cause="longer_than_model",
            )

    def __getitem__(self, cuts: Iterable[Cut]) -> dict[str, Any]:
        """Collates Lhotse cuts, or conversations, as NeMo's DuplexS2SDataset does, in NumPy.

        Gives `source_audio` and `target_audio` float32 [B, S] with their `..._lens` int32 [B],
        `source_tokens` and `target_tokens` int32 [B, T] with their `..._token_lens`, and
        `target_texts`. Frames are counted by each cut's own sampling rate. Speakers in neither role
        are left out. Raises AudioError if a recording cannot be used.
        """
        conversations = [
            cut if isinstance(cut, DuplexConversation) else duplex_conversation(cut) for cut in cuts
        ]
        examples = [self.example(conversation) for conversation in conversations]
        batch: dict[str, Any] = {}
        for voice in ("source", "target"):
            audio = [getattr(example, f"{voice}_audio") for example in examples]
            batch[f"{voice}_audio"], batch[f"{voice}_audio_lens"] = pad_right(audio)
            tokens = [getattr(example, f"{voice}_tokens") for example in examples]
            batch[f"{voice}_tokens"], batch[f"{voice}_token_lens"] = pad_right(
                tokens, self.pad_id, dtype=np.int32
            )
        return {**batch, "target_texts": [example.target_text for example in examples]}

    def _channel(
        self, turns: Sequence[SpokenTurn], frames: int, grid: FrameGrid
    ) -> Int[np.ndarray, " T"]:
        text_to_ids = self.tokenizer.text_to_ids
        return text_channel(turns, frames, grid=grid, text_to_ids=text_to_ids, ids=self._ids)


def clip_audio(
    clip: AudioClip, by_way_of_hz: int | None, to_hz: int, effects: "ClipEffects | None"
) -> Float[np.ndarray, " S"]:
    """Samples of a clip, exactly as many as its declared duration has."""
    wave = clip.load(to_hz if by_way_of_hz is None else by_way_of_hz, effects)
    if by_way_of_hz is not None:
        wave = resample(wave, by_way_of_hz, to_hz)
    samples = clip.samples(to_hz)
    return np.pad(wave[:samples], (0, max(samples - len(wave), 0)))
