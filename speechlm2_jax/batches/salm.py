"""SALM batches: conversations as sequences of interleaved text tokens and audio frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Generic, TypeVar

import jax
import numpy as np

from speechlm2_jax.batches.shared import A, FrameCount, TimeOrder
from speechlm2_jax.pytrees import register_pytree

B = TypeVar("B")
M = TypeVar("M", jax.Array, np.ndarray)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SalmBatch(Generic[A]):
    """One global batch for SALM. Arrays are NumPy on the host, JAX on the devices."""

    audio: A
    """Float32 [G, C, S]: 16 kHz (the model's rate) mono samples, zeros after each length."""
    audio_lengths: A
    """Int32 [G, C]: samples; 0 for padding (no clip)."""
    audio_extent: A
    """Int32 [G]: samples of the group's longest clip, to which NeMo pads (`nemo_exact`)."""
    clip_ids: A
    """Int32 [G, C]: index of the clip in the global batch; seeds its random draws."""
    tokens: A
    """Int32 [G, R, T]: token ids; 0 at audio frames and padding."""
    audio_index: A
    """Int32 [G, R, T]: clip * frames(S) + frame, with the clip's index in the group; -1 at text."""
    attention_mask: A
    """Bool [G, R, T]: True where queries may attend to the position; False at padding."""
    segments: A
    """Int32 [G, R, T]: conversation within a packed sequence, from 1; 0 is padding."""
    positions: A
    """Int32 [G, R, T]: position within the conversation, from 0."""
    targets: A
    """Int32 [G, R, T]: id of the next token; 0 where there is no loss."""
    loss_mask: A
    """Bool [G, R, T]: positions whose prediction counts in the loss."""
    sequence_ids: A
    """Int32 [G, R]: index of the sequence in the global batch; seeds its random draws."""
    unpacked: bool = field(default=False, metadata={"static": True})
    """True only if each row is one conversation from its first token, all of it attended to."""
    longest: int | None = field(default=None, metadata={"static": True})
    """No conversation of a packed row has more positions than this; None: unknown."""

    def map(self, fn: Callable[[A], B]) -> "SalmBatch[B]":
        """Applies `fn` to every array."""
        arrays = [f.name for f in fields(self) if not f.metadata.get("static")]
        changed = {name: fn(getattr(self, name)) for name in arrays}
        return SalmBatch(**changed, unpacked=self.unpacked, longest=self.longest)

    def without_id(self: "SalmBatch[M]", token_id: int) -> "SalmBatch[M]":
        """Masks text tokens of one id: they are neither attended to nor scored.

        NeMo masks the pad id wherever it occurs, even where it ends a turn (`nemo_exact`).
        """
        is_audio = self.audio_index >= 0
        return replace(
            self,
            unpacked=False,
            attention_mask=self.attention_mask & (is_audio | (self.tokens != token_id)),
            loss_mask=self.loss_mask & (self.targets != token_id),
        )

    def in_time_order(
        self: "SalmBatch[np.ndarray]", time_order: TimeOrder
    ) -> "SalmBatch[np.ndarray]":
        """Reorders the tokens of every sequence for context parallelism (`Sharding.time_order`)."""
        order = time_order(self.tokens.shape[2])
        if order is None:
            return self
        reordered = {name: getattr(self, name)[..., order] for name in PER_TOKEN}
        return replace(self, unpacked=False, longest=None, **reordered)


PER_TOKEN = (
    "tokens",
    "audio_index",
    "attention_mask",
    "segments",
    "positions",
    "targets",
    "loss_mask",
)
"""Fields whose last axis is T."""


@dataclass(frozen=True, kw_only=True)
class SalmExample:
    """One tokenized conversation: ids with a placeholder per audio clip, and the clips."""

    id: str
    tokens: np.ndarray
    """Int32 [L]: the whole conversation; each clip is one placeholder id."""
    loss_mask: np.ndarray
    """Bool [L]: True at tokens that the model is trained to predict."""
    audio: tuple[np.ndarray, ...] = ()
    """Float32 [S_i]: one clip per placeholder, in order, at the model's sample rate."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The static shape of one bucket: the sizes of one group."""

    sequences: int
    tokens: int
    """Length T of a sequence. Training on a conversation of L tokens (audio frames included) takes
    L - 1."""
    clips: int
    samples: int
    longest: int | None = field(default=None, repr=False)
    """Of packed rows: no conversation takes more positions."""

    @property
    def name(self) -> str:
        """Unique name of the shape; each shape is compiled once."""
        name = f"rows{self.sequences}_tokens{self.tokens}_clips{self.clips}_samples{self.samples}"
        return name if self.longest is None else f"{name}_longest{self.longest}"


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """One conversation, with placeholders expanded to the frames of their clips; arrays are [L]."""

    tokens: np.ndarray
    clip: np.ndarray
    """Index among the clips of the conversation; -1 for text."""
    frame: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def layout_sequence(
    tokens: np.ndarray,
    loss_mask: np.ndarray | None,
    clip_frames: Sequence[int],
    *,
    placeholder_id: int,
) -> SequenceLayout:
    """Expands each placeholder of a conversation to as many positions as its clip has frames.

    No position is padding, whatever its id: the pad token may also end turns. Raises ValueError if
    the numbers of placeholders and clips differ.
    """
    tokens = np.asarray(tokens, np.int64)
    mask = np.zeros(len(tokens), bool) if loss_mask is None else np.asarray(loss_mask, bool)
    is_audio = tokens == placeholder_id
    if is_audio.sum() != len(clip_frames):
        raise ValueError(
            f"the conversation has {is_audio.sum()} audio placeholders (id {placeholder_id}) "
            f"but {len(clip_frames)} audio clips; give exactly one clip per placeholder"
        )
    repeats = np.ones(len(tokens), np.int64)
    repeats[is_audio] = clip_frames
    clip = np.where(is_audio, np.cumsum(is_audio) - 1, -1)
    starts = np.cumsum(repeats) - repeats
    frame = np.arange(int(repeats.sum()), dtype=np.int64) - np.repeat(starts, repeats)
    text = np.where(is_audio, 0, tokens)
    return SequenceLayout(
        tokens=np.repeat(text, repeats).astype(np.int32),
        clip=np.repeat(clip, repeats).astype(np.int32),
        frame=frame.astype(np.int32),
        loss_mask=np.repeat(mask & ~is_audio, repeats),
    )


def assemble_salm_batch(
    groups: Sequence[Sequence[SalmExample | None]],
    shape: BatchShape,
    *,
    frame_count: FrameCount,
    placeholder_id: int,
    shift: bool = True,
    rows: Sequence[Sequence[int]] | None = None,
) -> SalmBatch[np.ndarray]:
    """Assembles a batch of one static shape, with sequences padded on the right.

    With `shift` (training) position t predicts token t + 1, and the last token is only a target.
    Without it (inference) every token is an input and nothing is scored. A group may have fewer
    conversations and clips than the shape; what is missing, and None, is padding.

    `rows` packs: it has the sequence of each conversation of each group. Conversations of one
    sequence follow one another as segments 1, 2, ..., each with positions from 0, so none attends
    to another. Without it each conversation is a sequence. Raises ValueError if one does not fit.
    """

    def layout(example: SalmExample) -> SequenceLayout:
        return layout_sequence(
            example.tokens,
            example.loss_mask,
            [frame_count(len(clip)) for clip in example.audio],
            placeholder_id=placeholder_id,
        )

    capacity = frame_count(shape.samples)
    G, R, C = len(groups), shape.sequences, shape.clips
    arrays = _empty_arrays(G, shape)
    for g, group in enumerate(groups):
        own = {name: array[g] for name, array in arrays.items()}
        places = range(len(group)) if rows is None else rows[g]
        _fill_group(own, group, places, shape, layout, capacity, shift)
    return SalmBatch(
        audio_extent=arrays["audio_lengths"].max(axis=1, initial=0),
        clip_ids=np.arange(G * C, dtype=np.int32).reshape(G, C),
        sequence_ids=np.arange(G * R, dtype=np.int32).reshape(G, R),
        unpacked=rows is None,
        longest=shape.longest,
        **arrays,
    )


def full_batch(
    shape: BatchShape, groups: int, *, frame_count: FrameCount, placeholder_id: int
) -> SalmBatch[np.ndarray]:
    """Makes a batch without padding: as many clips as fit, and text with a loss for the rest.

    For counting FLOPs and compiling. Its arrays take the memory of one group.
    """
    frames = frame_count(shape.samples) if shape.clips else 0
    clips = min(shape.clips // shape.sequences, shape.tokens // max(frames, 1))
    text = shape.tokens + 1 - clips * frames
    tokens = np.full(clips + text, placeholder_id + 1)
    tokens[:clips] = placeholder_id
    example = SalmExample(
        id="full",
        tokens=tokens,
        loss_mask=tokens != placeholder_id,
        audio=(np.zeros(shape.samples, np.float32),) * clips,
    )
    one = assemble_salm_batch(
        [[example] * shape.sequences],
        shape,
        frame_count=frame_count,
        placeholder_id=placeholder_id,
    )
    return one.map(lambda x: np.broadcast_to(x, (groups, *x.shape[1:])))


def _fill_group(
    arrays: dict[str, np.ndarray],
    examples: Sequence[SalmExample | None],
    rows: Sequence[int],
    shape: BatchShape,
    layout: Callable[[SalmExample], SequenceLayout],
    capacity: int,
    shift: bool,
) -> None:
    """Writes the sequences and clips of one group into its arrays."""
    clips = [(e.id, clip) for e in examples if e is not None for clip in e.audio]
    if max(rows, default=-1) >= shape.sequences or len(clips) > shape.clips:
        raise ValueError(f"{len(examples)} conversations with {len(clips)} clips exceed {shape}")
    for c, (name, clip) in enumerate(clips):
        if len(clip) > shape.samples:
            raise ValueError(f"{name!r}: a clip of {len(clip)} samples exceeds {shape}")
        arrays["audio"][c, : len(clip)] = clip
        arrays["audio_lengths"][c] = len(clip)
    first_clip, ends, segments = 0, [0] * shape.sequences, [0] * shape.sequences
    for r, example in zip(rows, examples, strict=True):
        if example is None:
            continue
        sequence = layout(example)
        n = max(len(sequence) - shift, 0)
        if n > (shape.longest or n):
            raise ValueError(f"{example.id!r}: {n} tokens exceed the longest of {shape}")
        if ends[r] + n > shape.tokens:
            after = f" after {ends[r]} others" if ends[r] else ""
            raise ValueError(f"{example.id!r}: {n} tokens{after} exceed {shape}")
        place = np.s_[r, ends[r] : ends[r] + n]
        ends[r], segments[r] = ends[r] + n, segments[r] + 1
        frame_index = (first_clip + sequence.clip) * capacity + sequence.frame
        arrays["tokens"][place] = sequence.tokens[:n]
        arrays["audio_index"][place] = np.where(sequence.clip >= 0, frame_index, -1)[:n]
        arrays["attention_mask"][place] = True
        arrays["segments"][place] = segments[r]
        arrays["positions"][place] = np.arange(n)
        if shift:
            arrays["loss_mask"][place] = sequence.loss_mask[1:]
            arrays["targets"][place] = np.where(sequence.loss_mask, sequence.tokens, 0)[1:]
        first_clip += len(example.audio)


def _empty_arrays(groups: int, shape: BatchShape) -> dict[str, np.ndarray]:
    per_token = (groups, shape.sequences, shape.tokens)
    ints = ("tokens", "segments", "positions", "targets")
    arrays: dict[str, np.ndarray] = {n: np.zeros(per_token, np.int32) for n in ints}
    arrays |= {n: np.zeros(per_token, bool) for n in ("attention_mask", "loss_mask")}
    arrays["audio_index"] = np.full(per_token, -1, np.int32)
    # np.zeros takes no memory until it is written: groups of other processes never are
    arrays["audio"] = np.zeros((groups, shape.clips, shape.samples), np.float32)
    arrays["audio_lengths"] = np.zeros((groups, shape.clips), np.int32)
    return arrays
