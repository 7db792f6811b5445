"""One data set of a duplex model: lengths, bucket shapes and batches of its conversations."""

import difflib
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.batches import (
    DuplexBatch,
    DuplexExample,
    DuplexShape,
    FrameCount,
    assemble_duplex_batch,
)
from speechlm2_jax.data.bucketing import Measures, Members
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversations import DuplexConversation, FrameGrid
from speechlm2_jax.data.duplex.speaker_counts import SpeakerCounts
from speechlm2_jax.data.index.lengths import samples_of
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.data.augmentation.augmentation import ExampleEffects
    from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset

MAX_TURNS_LEFT_OUT = 0.1
"""At most this share of all turns may be left out for unknown speakers."""
MAX_SILENT_SHARE = 0.5
"""A training set is refused if the agent has no text in a larger share of its conversations."""
FRAME_TOLERANCE = 2
"""Frames by which the encoder's count may differ from the grid's (edge effects)."""
_PROBE_FRAMES = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DuplexExamples(ABC):
    """Reads conversations of user and agent, and assembles batches of them."""

    dataset: "DuplexS2SDataset"
    config: DuplexLoaderConfig

    @abstractmethod
    def _conversation(self, index: int) -> DuplexConversation:
        """A conversation. Raises AudioError if its row has changed."""
        ...

    def shape(self, members: Members) -> DuplexShape:
        """The shape of a bucket: its frames, and the samples that they last."""
        dataset = self.dataset
        return DuplexShape(
            sequences=members.rows,
            tokens=members.tokens,
            source_samples=_samples(dataset, members.tokens, dataset.source_sample_rate),
            target_samples=_samples(dataset, members.tokens, dataset.target_sample_rate),
        )

    def columns(self, shape: DuplexShape) -> dict[str, str]:
        """Seconds of a row."""
        return {"seconds": f"{shape.tokens * self.dataset.frame_length:.2f}"}

    def example(self, index: int, effects: "ExampleEffects | None" = None) -> DuplexExample:
        """Reads a conversation's audio. Raises AudioError if any of it cannot be used."""
        return self.dataset.example(self._conversation(index), self.config.sample_rate, effects)

    def assemble(
        self,
        groups: Sequence[Sequence[DuplexExample | None]],
        shape: DuplexShape,
        rows: None = None,
    ) -> DuplexBatch:
        """The arrays of groups of examples; None is an empty sequence. Nothing packs them."""
        return assemble_duplex_batch(groups, shape, pad_id=self.dataset.pad_id)

    def reference(self, index: int, example: DuplexExample) -> DuplexExample:
        """The example itself: its audio is the input, its texts are the references."""
        return example


@dataclass(frozen=True, kw_only=True)
class DuplexContents(DuplexExamples):
    """The same with all conversations in memory (implements `prepare.Contents`)."""

    conversations: Sequence[DuplexConversation]
    measures: Measures

    @classmethod
    def of(
        cls,
        dataset: "DuplexS2SDataset",
        conversations: Sequence[DuplexConversation],
        config: DuplexLoaderConfig,
        frame_count: FrameCount,
        where: str,
    ) -> Self:
        """Measures conversations, after checks of their roles and of the model's frame rate.

        Raises SettingsError for a role that is in neither list, and for another frame rate.
        """
        check_frame_rate(dataset, frame_count)
        check_roles(conversations, dataset.input_roles, dataset.output_roles, where)
        seconds = np.asarray([c.duration_s for c in conversations], np.float64).reshape(-1)
        measures = measures_of(dataset, seconds, config.sample_rate)
        return cls(dataset=dataset, config=config, conversations=conversations, measures=measures)

    def tests(self) -> dict[str, Callable[[int], bool]]:
        """By cause: whether settings let the conversation of an index pass."""
        seconds = self.measures.length.tolist()
        frames, most = self.measures.positions.tolist(), self.dataset.max_frames
        least_s, most_s = self.config.min_duration or 0.0, self.config.max_duration or math.inf
        return {
            "longer_than_model": lambda i: most is None or frames[i] <= most,
            "shorter_than_frame": lambda i: seconds[i] >= self.dataset.frame_length,
            "min_duration": lambda i: seconds[i] >= least_s,
            "max_duration": lambda i: seconds[i] <= most_s,
        }

    def lengths(self) -> dict[str, np.ndarray]:
        """Seconds of each conversation."""
        return {"seconds": self.measures.length}

    def take(self, index: Int[np.ndarray, " n"]) -> "DuplexContents":
        """The same of some conversations."""
        chosen = tuple(self.conversations[i] for i in index.tolist())
        return replace(self, conversations=chosen, measures=self.measures.take(index))

    def validation_error(self, planned: Sequence[int]) -> str | None:
        """A reason where the agent is silent in more than MAX_SILENT_SHARE of an epoch."""
        has_text = speaker_counts(self.dataset, self.config.sample_rate).agent_has_text
        silent = [i for i in planned if not has_text(self.conversations[i])]
        return silence_error(self.dataset, self.name, silent, len(planned))

    def name(self, index: int) -> str:
        """The id of a conversation, for messages."""
        return self.conversations[index].id

    def _conversation(self, index: int) -> DuplexConversation:
        return self.conversations[index]


def silence_error(
    dataset: "DuplexS2SDataset", name: Callable[[int], str], silent: Sequence[int], planned: int
) -> str | None:
    """What is wrong with so many planned conversations; None unless the agent is mostly silent.

    Args:
        dataset: with the roles of the agent.
        name: of a conversation.
        silent: those in which the agent has no text.
        planned: how many there are in all.
    """
    if len(silent) <= MAX_SILENT_SHARE * planned:
        return None
    roles = ", ".join(repr(role) for role in dataset.output_roles)
    return (
        f"in {len(silent)} of {planned} conversations of an epoch, "
        f"{name(silent[0])!r} for instance, the agent has no text: a model "
        f"would learn to be silent. Supervisions whose speaker is one of data.output_roles "
        f"({roles}) need a text, and a start in seconds that is before the end of their cut"
    )


def speaker_counts(dataset: "DuplexS2SDataset", sample_rate_hz: int) -> SpeakerCounts:
    """What is counted of the turns of conversations."""
    grid = FrameGrid(frame_length_s=dataset.frame_length, sample_rate_hz=sample_rate_hz)
    return SpeakerCounts(grid=grid, output_roles=dataset.output_roles)


def measures_of(
    dataset: "DuplexS2SDataset", seconds: Float[np.ndarray, " N"], sample_rate_hz: int
) -> Measures:
    """Lengths of conversations that last so long: frames hold their texts and all their audio."""
    frames = speaker_counts(dataset, sample_rate_hz).grid.frames(seconds)
    for rate_hz in (dataset.source_sample_rate, dataset.target_sample_rate):
        lasting = samples_of(seconds, rate_hz) / (dataset.frame_length * rate_hz)
        frames = np.maximum(frames, np.ceil(np.round(lasting, 6)).astype(np.int64))
    ones = np.ones(len(seconds), np.int64)
    return Measures(length=seconds, positions=frames, clips=ones, samples=0 * ones)


def _samples(dataset: "DuplexS2SDataset", frames: int, sample_rate_hz: int) -> int:
    """Samples that frames last, up to a whole one."""
    return math.ceil(round(frames * dataset.frame_length * sample_rate_hz, 6))


def check_frame_rate(dataset: "DuplexS2SDataset", frame_count: FrameCount) -> None:
    """Raises SettingsError for a model that makes another number of frames than `frame_length`."""
    samples = _samples(dataset, _PROBE_FRAMES, dataset.source_sample_rate)
    made = frame_count(samples)
    if abs(made - _PROBE_FRAMES) > FRAME_TOLERANCE:
        seconds = samples / dataset.source_sample_rate
        raise SettingsError(
            f"data.frame_length: {dataset.frame_length} s makes {_PROBE_FRAMES} frames of "
            f"{seconds:.2f} s, but the model's speech encoder {made}; set it to the encoder's "
            f"frame, about {seconds / max(made, 1):.3g} s"
        )


def check_roles(
    conversations: Sequence[DuplexConversation],
    input_roles: Sequence[str],
    output_roles: Sequence[str],
    where: str,
    block: str = "data.",
) -> None:
    """Warns of turns whose speaker is neither user nor agent: they are left out, as in NeMo.

    `block` is that of the keys `input_roles` and `output_roles`. Raises SettingsError where such
    turns are more than MAX_TURNS_LEFT_OUT of all, and where one of both lists matches nobody.
    """
    found = Counter(turn.speaker for c in conversations for turn in c.turns)
    check_speakers(found, input_roles, output_roles, where, block)


def check_speakers(
    found: Counter[str | None],
    input_roles: Sequence[str],
    output_roles: Sequence[str],
    where: str,
    block: str = "data.",
) -> None:
    """The same of how many turns each speaker has."""
    known = (*input_roles, *output_roles)
    unknown = {speaker: n for speaker, n in found.most_common() if speaker not in known}
    if not unknown:
        return
    left_out, total = sum(unknown.values()), found.total()
    counts = ", ".join(f"{speaker!r} ({n} turns)" for speaker, n in found.most_common())
    near = [f"did you mean {_nearest(s, known)!r}?" for s in unknown if _nearest(s, known)]
    problem = (
        f"{where}: speakers of supervisions are {counts}, of which "
        f"{', '.join(map(repr, unknown))} is in neither {block}input_roles {list(input_roles)} nor "
        f"{block}output_roles {list(output_roles)}, which are matched letter by letter"
        + "".join(f"; {hint}" for hint in near)
    )
    for key, roles in (("input_roles", input_roles), ("output_roles", output_roles)):
        if not any(role in found for role in roles):
            raise SettingsError(
                f"{problem}; {block}{key} matches no speaker: list the speakers there"
            )
    if left_out > MAX_TURNS_LEFT_OUT * total:
        raise SettingsError(f"{problem}; list them there, or remove their supervisions")
    _log.warning("%s; these turns are left out", problem)


def _nearest(speaker: str | None, known: Sequence[str]) -> str | None:
    """A role that is spelt alike, without regard to case."""
    spelt: Mapping[str, str] = {role.casefold(): role for role in known}
    near = difflib.get_close_matches((speaker or "").casefold(), list(spelt), n=1)
    return spelt[near[0]] if near else None
