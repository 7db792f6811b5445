"""Examples of SALM: token ids, loss mask and audio of each conversation."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from speechlm2_jax.batches import FrameCount, SalmExample
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.augmentation.variants import with_variants
from speechlm2_jax.data.config import DataConfig, DataLoaderConfig
from speechlm2_jax.data.conversations import DEFAULT_LOCATOR_TAG, Conversation
from speechlm2_jax.data.entry_readers import options_of_type, read_entry
from speechlm2_jax.data.fusion import training_sets
from speechlm2_jax.data.index.changed_rows import changed_rows
from speechlm2_jax.data.index.contents import IndexedRows
from speechlm2_jax.data.index.counts import PromptCounts
from speechlm2_jax.data.index.entries import open_rows
from speechlm2_jax.data.index.list_rows import ListRows
from speechlm2_jax.data.index.salm import SalmRowMeasures
from speechlm2_jax.data.input_config import DUPLEX_TYPES, InputConfig
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.padding import pad_left, pad_right
from speechlm2_jax.data.prompts import PromptError, PromptFormatter
from speechlm2_jax.data.salm_contents import (
    SalmContents,
    locator_tags_of,
    measure,
    placeholder_id,
    placeholder_or_none,
)
from speechlm2_jax.data.streams.shards import StreamRows, stream_shards
from speechlm2_jax.data.text_windows import in_windows
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ExampleEffects

_DIALOGS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class SalmReference:
    """One conversation for a validation metric that generates."""

    id: str
    prompt: SalmExample
    """The conversation up to its last turn, with the generation prompt and the audio so far."""
    text: str
    """The reference response."""


class SALMDataset:
    """Turns conversations into examples.

    Args:
        tokenizer: with the audio locator tag among its tokens.
        sample_rate: of the samples that `dataset[conversations]` gives; a DataModule uses its own.
        prompt_format: of data whose settings name none; None: the tokenizer's chat template.
        packs: whether the model can train on several conversations in a row (`packed`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sample_rate: int = 16000,
        prompt_format: str | None = None,
        packs: bool = True,
    ) -> None:
        self.packs = packs
        self.tokenizer = tokenizer
        self.sample_rate = sample_rate
        self.prompt_format = prompt_format
        self.pad_id = tokenizer.pad_id

    data_config = DataConfig
    loader_config = DataLoaderConfig

    def check(self, config: DataConfig, where: str) -> None:
        """Raises SettingsError for packed training data of a model that cannot take them."""
        for values, place in training_sets(config.train_ds, f"{where}.train_ds").sets.values():
            if values.get("packed") and not self.packs:
                raise SettingsError(
                    f"{place}.packed: this model scores whole rows, which hold one conversation "
                    "each; it is for SALM"
                )

    @staticmethod
    def read(entry: InputConfig, config: DataLoaderConfig) -> list[Conversation]:
        """The conversations of one entry of `input_cfg`. Raises SettingsError."""
        return list(read_entry(entry, _options(entry, config)))

    @staticmethod
    def stream(entry: InputConfig, config: DataLoaderConfig) -> StreamRows:
        """The shards of one entry, to be read from front to end. Raises SettingsError."""
        return stream_shards(entry, _options(entry, config))

    def index(self, entry: InputConfig, config: DataLoaderConfig) -> IndexedRows | None:
        """The same, read when they are asked for; None of what has no index.

        Builds the indexes of the manifests where they are missing. Raises SettingsError.
        """
        if entry.type in DUPLEX_TYPES:
            return None  # refused where it is read
        if config.cut_text_into_windows_tokens is not None and entry.paths:
            return None  # an index does not know how many windows there are
        options = options_of_type(entry, _options(entry, config))
        return open_rows(entry, options, self._counts(config, {options.locator_tag}))

    def list_rows(
        self, conversations: Sequence[Conversation], config: DataLoaderConfig, where: str
    ) -> ListRows:
        """A list beside indexes: its columns. Raises SettingsError as `contents`."""
        self.formatter(config, where)
        tags = locator_tags_of(conversations)
        return ListRows.of(conversations, self._counts(config, tags), frozenset(tags))

    def row_measures(
        self, parts: Any, config: DataLoaderConfig, frame_count: FrameCount, where: str
    ) -> SalmRowMeasures:
        """What measures the rows of a large data set. Raises SettingsError as `contents`."""
        return SalmRowMeasures.of(self, config, parts, frame_count, where)

    def _counts(self, config: DataLoaderConfig, tags: Collection[str]) -> PromptCounts:
        return PromptCounts(
            tokenizer=self.tokenizer,
            prompt_format=config.prompt_format or self.prompt_format,
            placeholder_id=placeholder_or_none(tags, self.tokenizer),
        )

    def formatter(self, config: DataLoaderConfig, where: str) -> PromptFormatter:
        """What makes prompts of conversations.

        Raises SettingsError if the prompt format does not suit the tokenizer.
        """
        try:
            return PromptFormatter(config.prompt_format or self.prompt_format, self.tokenizer)
        except (PromptError, TokenizerError) as error:
            raise SettingsError(f"{where}.prompt_format: {error}") from error

    def variants(
        self, conversations: Sequence[Conversation], config: DataLoaderConfig
    ) -> Sequence[Conversation]:
        """The examples that are made of conversations: at other speeds, texts in windows."""
        if isinstance(conversations, IndexedRows):
            return changed_rows(conversations, config)
        if config.cut_text_into_windows_tokens is not None:
            tokens = config.cut_text_into_windows_tokens
            conversations = in_windows(conversations, tokens, self.tokenizer)
        return with_variants(conversations, config)

    def contents(
        self,
        conversations: Sequence[Conversation],
        config: DataLoaderConfig,
        frame_count: FrameCount,
        where: str,
    ) -> SalmContents:
        """Tokenises and measures.

        Raises SettingsError if the prompt format or the audio tag does not suit the tokenizer.
        """
        placeholder = placeholder_id(conversations, self.tokenizer, where)
        encoded = _encode_all(conversations, self.formatter(config, where))
        try:
            measures = measure(
                encoded,
                frame_count=frame_count,
                config=config,
            )
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from error
        return SalmContents(
            dataset=self,
            config=config,
            conversations=encoded,
            measures=measures,
            frame_count=frame_count,
            placeholder_id=placeholder,
        )

    def encode(
        self, conversations: Sequence[Conversation], prompt_format: str | None
    ) -> list[Conversation]:
        """Gives each conversation its token ids.

        Raises PromptError, naming the conversation, for one that the format cannot express.
        """
        return _encode_all(conversations, PromptFormatter(prompt_format, self.tokenizer))

    def example(
        self,
        conversation: Conversation,
        sample_rate_hz: int,
        effects: "ExampleEffects | None" = None,
    ) -> SalmExample:
        """Reads the audio of a conversation; raises AudioError if any of it cannot be used.

        `effects` are the random changes of its samples in one epoch.
        """
        if conversation.prompt is None:
            raise ValueError(
                f"conversation {conversation.id!r} has no token ids: call encode first"
            )
        ids, mask = conversation.prompt.input_ids, conversation.prompt.mask
        return SalmExample(
            id=conversation.id,
            tokens=ids,
            loss_mask=np.zeros(len(ids), bool) if mask is None else mask,
            audio=tuple(
                clip.load(sample_rate_hz, effects and effects.of_clip(number))
                for number, clip in enumerate(conversation.clips)
            ),
        )

    def reference(self, conversation: Conversation, example: SalmExample) -> SalmReference:
        """Splits an example into the prompt and the reference response."""
        assert conversation.prompt is not None
        prompt_ids = conversation.prompt.prompt_ids
        response_clips = len(conversation.clips) - _clips_before_response(conversation)
        return SalmReference(
            id=conversation.id,
            prompt=SalmExample(
                id=conversation.id,
                tokens=prompt_ids,
                loss_mask=np.zeros(len(prompt_ids), bool),
                audio=example.audio[: len(example.audio) - response_clips],
            ),
            text=conversation.response or "",
        )

    def __getitem__(self, conversations: Iterable[Conversation]) -> dict[str, Any] | None:
        """Collates a batch as NeMo's SALMDataset does, in NumPy.

        Gives `audios` float32 [B', S], `audio_lens` int32 [B'], and left-padded `input_ids`
        int32 [B, T] and `loss_mask` bool [B, T]. Conversations whose audio cannot be used are
        left out of it and of `conversations`; None if that leaves nothing.
        """
        usable = list(self._usable(conversations))
        if not usable:
            return None
        examples = [example for _, example in usable]
        clips = [clip for example in examples for clip in example.audio]
        audios, audio_lens = pad_right(clips)
        return {
            "audios": audios,
            "audio_lens": audio_lens,
            "input_ids": pad_left([e.tokens for e in examples], self.pad_id),
            "loss_mask": pad_left([e.loss_mask for e in examples], False, dtype=bool),
            "conversations": [conversation for conversation, _ in usable],
        }

    def _usable(
        self, conversations: Iterable[Conversation]
    ) -> Iterator[tuple[Conversation, SalmExample]]:
        for conversation in conversations:
            try:
                yield conversation, self.example(conversation, self.sample_rate)
            except AudioError:
                continue


def _seed(entry: InputConfig, config: DataLoaderConfig) -> int:
    """Of what a reader draws: the nearest integer; words give 0, as hosts must agree."""
    given = (entry.shard_seed, config.shard_seed, config.seed)
    return next((one for one in given if isinstance(one, int)), 0)


def _options(entry: InputConfig, config: DataLoaderConfig) -> ManifestOptions:
    """How the rows of an entry become conversations."""
    channel = config.channel_selector
    return ManifestOptions(
        locator_tag=entry.audio_locator_tag or config.audio_locator_tag or DEFAULT_LOCATOR_TAG,
        token_equivalent_duration_s=entry.token_equivalent_duration
        or config.token_equivalent_duration,
        tags=entry.tags,
        text_field=entry.text_field or config.text_field,
        channel=channel if isinstance(channel, int) else None,
        question_role="system" if config.prompt_format == "llama2" else "user",
        seed=_seed(entry, config),
        skip_missing=config.skip_missing_manifest_entries
        if entry.skip_missing_manifest_entries is None
        else entry.skip_missing_manifest_entries,
    )


def _encode_all(
    conversations: Sequence[Conversation], formatter: PromptFormatter
) -> list[Conversation]:
    encoded: list[Conversation] = []
    for start in range(0, len(conversations), _DIALOGS_AT_ONCE):
        encoded += _encode(conversations[start : start + _DIALOGS_AT_ONCE], formatter)
    return encoded


def _encode(chunk: Sequence[Conversation], formatter: PromptFormatter) -> list[Conversation]:
    try:
        prompts = formatter.encode_dialogs([formatter.dialog(c.messages()) for c in chunk])
    except PromptError as error:
        if len(chunk) == 1:
            raise PromptError(f"conversation {chunk[0].id!r}: {error}") from error
        return [encoded for one in chunk for encoded in _encode([one], formatter)]
    return [replace(c, prompt=p) for c, p in zip(chunk, prompts, strict=True)]


def _clips_before_response(conversation: Conversation) -> int:
    """Audio turns before the run of turns that ends the conversation."""
    last, turns = conversation.turns[-1].role, list(conversation.turns)
    while turns and turns[-1].role == last:
        turns.pop()
    return len(replace(conversation, turns=tuple(turns)).clips)
