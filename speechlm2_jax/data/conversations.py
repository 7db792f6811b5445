"""Conversations of text and audio turns, before any tokenizer: the result of every reader."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import AudioError, check_samples, read_audio, resample
from speechlm2_jax.data.audio_location import AudioLocation, ParquetCell
from speechlm2_jax.data.augmentation.changes import ClipChanges
from speechlm2_jax.data.lhotse_types import Cut
from speechlm2_jax.data.prompts import Prompt
from speechlm2_jax.data.storage.access import StorageAccess, current

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ClipEffects

DEFAULT_LOCATOR_TAG = "<|audioplaceholder|>"


@dataclass(frozen=True, kw_only=True)
class AudioClip:
    """Where the samples of one audio turn are; nothing is read until `load`."""

    id: str
    path: str
    duration_s: float
    """As the manifest declares it. Batches are planned with it, so no disk can change a plan."""
    offset_s: float = 0.0
    channel: int | None = None
    """None: the mean of all channels."""
    is_segment: bool = True
    """Whether the file may be longer than `duration_s`."""
    byte_range: tuple[int, int] | None = None
    """First byte and size of the recording inside `path`, a tar; None: the whole file."""
    silence_s: float = 0.0
    """How much of `duration_s`, at its end, is silence that no file has."""
    cell: ParquetCell | None = None
    """Of a recording that is a value in `path`, a Parquet file."""
    storage: StorageAccess = field(default_factory=current, repr=False, compare=False)
    """How a remote recording is read."""
    data: bytes | None = field(default=None, repr=False)
    """The bytes of `byte_range`, where they have been read."""
    cut: Cut | None = None
    """A Lhotse cut that only Lhotse can load (mixed, augmented or in memory)."""
    changes: ClipChanges | None = None
    """What augmentation makes of its length; `duration_s` is the result."""

    def samples(self, sample_rate_hz: int) -> int:
        """The length to plan with: never less than what `load` gives."""
        return math.floor(round(self.duration_s * sample_rate_hz, 6) + 0.5)

    def load(
        self, sample_rate_hz: int, effects: "ClipEffects | None" = None
    ) -> Float[np.ndarray, " S"]:
        """Reads the clip at the rate asked for. Raises AudioError for one that cannot be used.

        `effects` are the random changes of its samples in one epoch.
        """
        place = 0.0 if self.changes is None or effects is None else effects.place()
        wave = self._source(place)._load(sample_rate_hz)
        if effects is not None:
            wave = effects.on_source(wave, sample_rate_hz)
        if self.changes is not None:
            wave = self.changes.apply(wave, sample_rate_hz, self.samples(sample_rate_hz), place)
        return wave if effects is None else effects.on_result(wave, sample_rate_hz)

    def stretch(self, start_s: float, duration_s: float) -> "AudioClip":
        """A part of it, with its part of the silence at the end; less than 0 is a distance."""
        silence_s = start_s + duration_s - (self.duration_s - self.silence_s)
        return replace(
            self,
            offset_s=self.offset_s + start_s,
            duration_s=duration_s,
            silence_s=min(silence_s, duration_s),
            is_segment=True,
        )

    def _source(self, place: float) -> "AudioClip":
        """What is read of the file; `place` is where a stretch with room begins."""
        changes = self.changes
        if changes is None:
            return self
        moved_s = place * changes.room_s
        return replace(
            self,
            changes=None,
            duration_s=changes.read_s,
            offset_s=self.offset_s + moved_s,
            silence_s=min(self.silence_s + moved_s, changes.read_s),
        )

    def _load(self, sample_rate_hz: int) -> np.ndarray:
        if self.silence_s > 0:
            return self._load_before_silence(sample_rate_hz)
        try:
            wave = (
                self._load_cut(self.cut, sample_rate_hz) if self.cut else self._read(sample_rate_hz)
            )
        except AudioError as error:
            error.path = error.path or self.path
            raise
        # resampling rounds, and manifests round durations: a plan must hold all the same
        return wave[: self.samples(sample_rate_hz)]

    def _load_before_silence(self, sample_rate_hz: int) -> np.ndarray:
        wave, samples = np.zeros(0, np.float32), self.samples(sample_rate_hz)
        if self.duration_s > self.silence_s:
            recorded_s = self.duration_s - self.silence_s
            wave = replace(self, silence_s=0.0, duration_s=recorded_s)._load(sample_rate_hz)
        return np.pad(wave[:samples], (0, max(samples - len(wave), 0)))

    def _read(self, sample_rate_hz: int) -> np.ndarray:
        location = AudioLocation(self.path, self.byte_range, self.cell, self.storage)
        return read_audio(
            location.source(self.id) if self.data is None else location.named(self.data, self.id),
            sample_rate_hz=sample_rate_hz,
            offset_s=self.offset_s,
            duration_s=self.duration_s,
            channel=self.channel,
            is_segment=self.is_segment,
        )

    def _load_cut(self, cut: Cut, sample_rate_hz: int) -> np.ndarray:
        try:
            if self.is_segment and self.duration_s < cut.duration:
                cut = cut.truncate(offset=self.offset_s, duration=self.duration_s)
            wave = np.asarray(cut.load_audio(), np.float32)
        except Exception as error:  # Lhotse raises many kinds, all of which mean: no audio
            reason = " ".join(str(error).split())[:200]
            raise AudioError(f"cut {self.id}: {reason}", cause="unreadable") from error
        mono = check_samples(wave.mean(axis=0), f"cut {self.id}")
        return resample(mono, cut.sampling_rate, sample_rate_hz)


def silent_clip(name: str, duration_s: float) -> AudioClip:
    """Silence, without a file."""
    return AudioClip(id=name, path="", duration_s=duration_s, silence_s=duration_s)


@runtime_checkable
class AnyConversation(Protocol):
    """What planning reads of a conversation: of one voice (`Conversation`) or of two."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def where(self) -> str:
        """The manifest and the line that it was read from, for messages."""
        ...

    @property
    def shard(self) -> int:
        """The shard of its source that it was read from, counted from 0."""
        ...


class Timed(Protocol):
    """What an index keeps of the lengths of a conversation."""

    @property
    def clip_durations_s(self) -> tuple[float, ...]:
        """Seconds of each recording, as declared."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextTurn:
    """A text."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class AudioTurn:
    """A recording; in the prompt its locator tag stands for it."""

    role: str
    clip: AudioClip
    locator_tag: str = DEFAULT_LOCATOR_TAG


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns in order, of any role."""

    id: str
    turns: tuple[TextTurn | AudioTurn, ...]
    token_equivalent_duration_s: float | None = None
    """Seconds of audio that count as one token where lengths are measured."""
    fields: Mapping[str, object] = field(default_factory=dict, repr=False)
    """All other fields of its manifest row."""
    where: str = ""
    """The manifest and the line that it was read from, for messages."""
    shard: int = 0
    """The shard of its source that it was read from, counted from 0."""
    is_dialog: bool = True
    """Whether its turns are its row's own, and not made of a recording and its transcript."""
    prompt: Prompt | None = field(default=None, repr=False)
    """Its token ids, once a prompt format was applied."""

    @functools.cached_property
    def clips(self) -> tuple[AudioClip, ...]:
        """The audio behind the placeholders, in order."""
        return tuple(turn.clip for turn in self.turns if isinstance(turn, AudioTurn))

    @property
    def clip_durations_s(self) -> tuple[float, ...]:
        """Seconds of each audio turn, as declared."""
        return tuple(clip.duration_s for clip in self.clips)

    @property
    def audio_duration_s(self) -> float:
        """Seconds of all audio turns, as declared."""
        return sum(self.clip_durations_s)

    @property
    def response(self) -> str | None:
        """The reference response: the last turn if it is the assistant's text, else None."""
        last = self.turns[-1]
        return last.text if isinstance(last, TextTurn) and last.role == "assistant" else None

    def messages(self) -> list[tuple[str, str]]:
        """(role, text) of each turn, with the locator tag for audio."""
        return [(t.role, t.text if isinstance(t, TextTurn) else t.locator_tag) for t in self.turns]

    @functools.cached_property
    def lengths(self) -> "ConversationLengths":
        """Its lengths as NeMo measures them; needs a prompt. Raises ValueError without one."""
        if self.prompt is None:
            raise ValueError(
                f"conversation {self.id!r} has no token ids yet; apply a prompt format"
            )
        if self.clips and not self.token_equivalent_duration_s:
            raise ValueError("set token_equivalent_duration: the seconds of audio per token")
        extra = [self._extra_tokens(turn) for turn in self.turns]
        response = self.prompt.answer_ids
        return ConversationLengths(
            input_tokens=len(self.prompt.context_ids) + sum(extra[:-1]),
            output_tokens=0 if response is None else len(response) + extra[-1],
            total_tokens=len(self.prompt.input_ids) + sum(extra),
        )

    def _extra_tokens(self, turn: TextTurn | AudioTurn) -> int:
        """Tokens beyond the placeholder that a turn's audio takes."""
        if isinstance(turn, TextTurn):
            return 0
        assert self.token_equivalent_duration_s is not None
        return math.ceil(turn.clip.duration_s / self.token_equivalent_duration_s) - 1


@dataclass(frozen=True, kw_only=True)
class ConversationLengths:
    """A conversation's lengths, audio counted by `token_equivalent_duration`."""

    input_tokens: int
    """All before the last turn."""
    output_tokens: int
    """The last turn."""
    total_tokens: int
