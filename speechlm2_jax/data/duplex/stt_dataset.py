"""Examples of a duplex speech-to-text model: user audio, two text channels, a system prompt."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from speechlm2_jax.batches import (
    DuplexExample,
    DuplexShape,
    DuplexSttBatch,
    FrameCount,
    assemble_duplex_stt_batch,
)
from speechlm2_jax.data.bucketing import Members
from speechlm2_jax.data.config import DataConfig
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.contents import DuplexContents, silence_error, speaker_counts
from speechlm2_jax.data.duplex.conversations import DuplexConversation, FrameGrid
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset, clip_audio
from speechlm2_jax.data.duplex.entry_readers import read_duplex_entry
from speechlm2_jax.data.duplex.readers import duplex_conversation
from speechlm2_jax.data.duplex.stt_channel import WordTimes, stt_channel
from speechlm2_jax.data.duplex.variants import at_place
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.lhotse_types import Cut
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import Refusal, SettingsError, build

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ExampleEffects

ASR = "asr"
"""Task of conversations whose agent is not scored."""
PROMPT_UNIT = 8
"""Room for system prompts is rounded up to a multiple of it."""
_AUGMENTATION = "set the noise and impulse responses of data.train_ds"


@dataclass(frozen=True, kw_only=True)
class DuplexSttDataConfig(DataConfig):
    """The `data` block of a duplex speech-to-text model."""

    frame_length: float | None = None
    """Required: seconds of a frame, for which there is a token of each text channel."""
    source_sample_rate: int | None = None
    """Required: Hertz of the user's audio, the speech encoder's."""
    input_roles: tuple[str, ...] | None = None
    """Speakers of supervisions that are the user, spelt exactly so; null: `user`."""
    output_roles: tuple[str, ...] | None = None
    """Speakers of supervisions that are the agent, spelt exactly so; null: `agent`."""
    word_align_position: Literal["left", "right"] = "left"
    """Tokens of a word with times start with the word, or end with it."""
    prepend_word_space: bool = True
    """Words with times are tokenised with a space before them."""

    IGNORED: ClassVar[Mapping[str, Refusal]] = {
        "target_sample_rate": "the agent has no audio",
        "early_interruption_overlap_tokens": "it goes with early_interruption_prob",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **DataConfig.REFUSED,
        "aug_by_swap_role": "give an entry of the type s2s_duplex_reverse_role",
        "early_interruption_prob": "write interrupted turns into the manifest",
        "add_mcq_val_prompt": "write system_prompt into the custom fields of the cuts",
        "use_noise_aug": _AUGMENTATION,
        "use_room_ir_aug": _AUGMENTATION,
        "use_mic_ir_aug": _AUGMENTATION,
        "use_codec_aug": _AUGMENTATION,
        "force_use_noise_augmentation": _AUGMENTATION,
    }


class DuplexSTTDataset(DuplexS2SDataset):
    """Turns conversations into examples; the agent's recordings are neither needed nor read.

    Arguments are those of DuplexS2SDataset, without the agent's rate.

    Args:
        has_user_text: whether the model predicts the user's text (`model.predict_user_text`): times
            in the user's texts then place their words.
        word_align_position: tokens of a word with times start (`left`) or end (`right`) with it.
        prepend_word_space: words with times are tokenised with a space before them.
    """

    data_config: ClassVar[type[Any]] = DuplexSttDataConfig
    loader_config = DuplexLoaderConfig
    own_keys: ClassVar[tuple[str, ...]] = (
        *("frame_length", "source_sample_rate", "input_roles", "output_roles"),
        *("word_align_position", "prepend_word_space"),
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        frame_length: float,
        source_sample_rate: int,
        input_roles: Iterable[str] | None = None,
        output_roles: Iterable[str] | None = None,
        has_user_text: bool = False,
        word_align_position: Literal["left", "right"] = "left",
        prepend_word_space: bool = True,
    ) -> None:
        rates = (source_sample_rate, source_sample_rate)
        super().__init__(tokenizer, frame_length, *rates, input_roles, output_roles)
        self.has_user_text = has_user_text
        self.word_align_position: Literal["left", "right"] = word_align_position
        self.prepend_word_space = prepend_word_space

    @classmethod
    def of_block(
        cls, data: Mapping[str, object], tokenizer: Tokenizer, *, has_user_text: bool
    ) -> "DuplexSTTDataset":
        """Makes one of the keys of a `data` block. Raises SettingsError for a missing one."""
        config = build(DuplexSttDataConfig, data, "data")
        values = {name: getattr(config, name) for name in cls.own_keys}
        for name in ("frame_length", "source_sample_rate"):
            if values[name] is None:
                raise SettingsError(f"data.{name}: required for a duplex model")
        return cls(tokenizer, **values, has_user_text=has_user_text)

    @staticmethod
    def read(entry: InputConfig, config: DuplexLoaderConfig) -> list[DuplexConversation]:
        """The conversations of one entry of `input_cfg`. Raises SettingsError."""
        return list(read_duplex_entry(entry, config, has_agent=False))

    def index(self, entry: InputConfig, config: DuplexLoaderConfig) -> None:
        """None: conversations are held in memory, because their prompts are measured."""
        return

    def contents(
        self,
        conversations: Sequence[DuplexConversation],
        config: DuplexLoaderConfig,
        frame_count: FrameCount,
        where: str,
    ) -> "DuplexSttContents":
        """Measures; raises SettingsError as DuplexS2SDataset does."""
        made = DuplexSttContents.of(self, conversations, config, frame_count, where)
        longest = max((len(self.prompt(c)) for c in made.conversations), default=0)
        return replace(made, prompt_room=-(-longest // PROMPT_UNIT) * PROMPT_UNIT)

    def example(
        self,
        conversation: DuplexConversation,
        sample_rate_hz: int | None = None,
        effects: "ExampleEffects | None" = None,
    ) -> DuplexExample:
        """Reads the user's audio and writes the text channels; as DuplexS2SDataset does.

        Raises AudioError for a recording or a text that cannot be used.
        """
        on_user = effects and effects.of_clip(0)
        conversation = at_place(conversation, on_user.place() if on_user else 0.0)
        rate_hz = conversation.sample_rate_hz if sample_rate_hz is None else sample_rate_hz
        grid = FrameGrid(frame_length_s=self.frame_length, sample_rate_hz=rate_hz)
        user, agent = (
            conversation.turns_of(frozenset(roles))
            for roles in (self.input_roles, self.output_roles)
        )
        return DuplexExample(
            id=conversation.id,
            source_audio=clip_audio(conversation.source, rate_hz, self.source_sample_rate, on_user),
            target_audio=np.zeros(0, np.float32),
            target_tokens=self._stt_channel(conversation, self.output_roles, grid),
            source_tokens=self._stt_channel(
                conversation, self.input_roles, grid, self._words if self.has_user_text else None
            ),
            target_text=" ".join(turn.text for turn in agent),
            source_text=" ".join(turn.text for turn in user),
            prompt_tokens=np.array(self.prompt(conversation), np.int32),
            is_asr=conversation.task == ASR,
        )

    def prompt(self, conversation: DuplexConversation) -> list[int]:
        """The tokens of the system prompt, between bos and eos; none without one."""
        if not conversation.system_prompt:
            return []
        tokens = self.tokenizer.text_to_ids(conversation.system_prompt)
        return [self._ids.bos, *tokens, self._ids.eos]

    def __getitem__(self, cuts: Iterable[Cut]) -> dict[str, Any]:
        """Collates Lhotse cuts, or conversations, as NeMo's DuplexSTTDataset does, in NumPy."""
        conversations = [
            cut
            if isinstance(cut, DuplexConversation)
            else duplex_conversation(cut, has_agent=False)
            for cut in cuts
        ]
        examples = [self.example(conversation) for conversation in conversations]
        audio, lengths = pad_right([example.source_audio for example in examples])
        batch: dict[str, Any] = {"source_audio": audio, "source_audio_lens": lengths}
        names = {"target_token": "target_tokens", "source_token": "source_tokens"}
        if any(len(example.prompt_tokens) for example in examples):
            names["prompt_token"] = "prompt_tokens"
        for name, field in names.items():
            tokens = [getattr(example, field) for example in examples]
            padded = pad_right(tokens, self.pad_id, dtype=np.int32)
            batch[f"{name}s"], batch[f"{name}_lens"] = padded
        texts = {f"{v}_texts": [getattr(e, f"{v}_text") for e in examples] for v in _VOICES}
        return {**batch, **texts, "sample_id": [example.id for example in examples]}

    @property
    def _words(self) -> WordTimes:
        return WordTimes(position=self.word_align_position, prepend_space=self.prepend_word_space)

    def _stt_channel(
        self,
        conversation: DuplexConversation,
        roles: Sequence[str],
        grid: FrameGrid,
        words: WordTimes | None = None,
    ) -> np.ndarray:
        return stt_channel(
            [turn for turn in conversation.turns if turn.speaker in roles],
            grid.frame(conversation.duration_s),
            grid=grid,
            text_to_ids=self.tokenizer.text_to_ids,
            ids=self._ids,
            words=words,
        )


_VOICES = ("source", "target")


@dataclass(frozen=True, kw_only=True)
class DuplexSttContents(DuplexContents):
    """One data set of a speech-to-text model."""

    prompt_room: int = 0
    """Tokens of the longest system prompt, rounded up."""

    def shape(self, members: Members) -> DuplexShape:
        """The shape of a bucket: its frames, their samples, and room for prompts."""
        return replace(super().shape(members), target_samples=0, prompt_tokens=self.prompt_room)

    def assemble(
        self,
        groups: Sequence[Sequence[DuplexExample | None]],
        shape: DuplexShape,
        rows: None = None,
    ) -> DuplexSttBatch:
        """The arrays of groups of examples; None is an empty sequence."""
        return assemble_duplex_stt_batch(groups, shape, pad_id=self.dataset.pad_id)

    def tests(self) -> dict[str, Any]:
        """As DuplexContents, and: ASR data needs a text of the user."""
        roles = frozenset(self.dataset.input_roles)

        def has_text(index: int) -> bool:
            one = self.conversations[index]
            return one.task != ASR or any(turn.text for turn in one.turns_of(roles))

        return {**super().tests(), "asr_without_text": has_text}

    def validation_error(self, planned: Sequence[int]) -> str | None:
        """As DuplexContents; in ASR data the agent may be silent."""
        has_text = speaker_counts(self.dataset, self.config.sample_rate).agent_has_text
        silent = [
            i
            for i in planned
            if self.conversations[i].task != ASR and not has_text(self.conversations[i])
        ]
        return silence_error(self.dataset, self.name, silent, len(planned))
