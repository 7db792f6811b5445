"""Conversations of text and recordings, laid out in rows of interleaved steps (SALM)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from speechlm2_jax.batches.shared import FrameCount, TimeOrder


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SalmBatch:
    """One global batch for SALM. Array fields are NumPy on the host, JAX on the device."""

    audio: Any
    """Float32 [G, C, S]: 16 kHz (the model's rate) mono samples, zeros after each length."""
    audio_lengths: Any
    """Int32 [G, C] samples; 0 marks an empty clip slot."""
    audio_extent: Any
    """Int32 [G] samples of the group's longest clip: NeMo's padded length (`nemo_exact`)."""
    clip_ids: Any
    """Int32 [G, C]: the clip's position in the global batch; random draws depend on it."""
    tokens: Any
    """Int32 [G, R, T]: text ids; 0 in audio slots and padding."""
    audio_index: Any
    """Int32 [G, R, T]: clip * frames(S) + frame within the group; -1 where the step is text."""
    attention_mask: Any
    """Bool [G, R, T]: tokens that others may attend to; False in padding alone."""
    segments: Any
    """Int32 [G, R, T]: conversation of a packed row, from 1; 0 is padding."""
    positions: Any
    """Int32 [G, R, T]: step within the conversation, from 0."""
    targets: Any
    """Int32 [G, R, T]: the next token; 0 where there is no loss."""
    loss_mask: Any
    """Bool [G, R, T]: steps whose prediction is scored."""
    row_ids: Any
    """Int32 [G, R]: the row's position in the global batch; random draws depend on it."""

    def map(self, fn: Callable[[Any], Any]) -> "SalmBatch":
        """Applies `fn` to every array."""
        return SalmBatch(**{f.name: fn(getattr(self, f.name)) for f in fields(self)})

    def without_id(self, token_id: int) -> "SalmBatch":
        """The same rows, in which text tokens of one id are neither attended to nor scored.

        NeMo treats the pad id so wherever it occurs, even as the end of a turn (`nemo_exact`).
        """
        is_audio = self.audio_index >= 0
        return replace(
            self,
            attention_mask=self.attention_mask & (is_audio | (self.tokens != token_id)),
            loss_mask=self.loss_mask & (self.targets != token_id),
        )

    @property
    def steps(self) -> int:
        """LLM steps T of a row."""
        return self.tokens.shape[2]

    def laid_out(self, time_order: TimeOrder) -> "SalmBatch":
        """The same rows with their steps where a mesh wants them (`Sharding.time_order`)."""
        order = time_order(self.steps)
        if order is None:
            return self
        return replace(self, **{name: getattr(self, name)[..., order] for name in _BY_STEP})


_BY_STEP = (
    "tokens",
    "audio_index",
    "attention_mask",
    "segments",
    "positions",
    "targets",
    "loss_mask",
)
"""Fields whose last axis is the steps."""


@dataclass(frozen=True, kw_only=True)
class SalmExample:
    """One conversation, ready for the model: ids with placeholders, and the audio behind them."""

    id: str
    tokens: np.ndarray
    """Int32 [L]: the whole conversation; each audio turn is one placeholder id."""
    loss_mask: np.ndarray
    """Bool [L]: tokens that the model learns to say."""
    audio: tuple[np.ndarray, ...] = ()
    """Float32 [S_i] at the model's rate, one per placeholder, in order."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The static shape of one bucket, per group."""

    rows: int
    tokens: int
    """LLM steps T of a row: a conversation of L expanded tokens needs L - 1 to train on."""
    clips: int
    samples: int

    @property
    def name(self) -> str:
        """A name that says the whole shape: one compiled program each."""
        return f"rows{self.rows}_tokens{self.tokens}_clips{self.clips}_samples{self.samples}"


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """One conversation after every placeholder became its audio's frames; arrays are [L]."""

    tokens: np.ndarray
    clip: np.ndarray
    """Index among the conversation's own clips; -1 for text."""
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
    """Expands each placeholder of one conversation to as many tokens as its clip has frames.

    No token is padding, whatever its id: the pad token may also end turns. Raises ValueError if the
    numbers of placeholders and clips differ.
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
) -> SalmBatch:
    """Lays out groups of conversations in one static shape, rows padded on the right.

    With `shift` (training) step t predicts token t + 1 and the last token is only a target; without
    it (answering) every token is an input and nothing is scored. None, and fewer conversations or
    clips than the shape holds, leave masked rows. Raises ValueError if a conversation does not fit.
    """

    def layout(example: SalmExample) -> SequenceLayout:
        return layout_sequence(
            example.tokens,
            example.loss_mask,
            [frame_count(len(clip)) for clip in example.audio],
            placeholder_id=placeholder_id,
        )

    capacity = frame_count(shape.samples)
    G, R, C = len(groups), shape.rows, shape.clips
    arrays = _empty_arrays(G, shape)
    for g, group in enumerate(groups):
        own = {name: array[g] for name, array in arrays.items()}
        _fill_group(own, group, shape, layout, capacity, shift)
    return SalmBatch(
        audio_extent=arrays["audio_lengths"].max(axis=1, initial=0),
        clip_ids=np.arange(G * C, dtype=np.int32).reshape(G, C),
        row_ids=np.arange(G * R, dtype=np.int32).reshape(G, R),
        **arrays,
    )


def full_batch(
    shape: BatchShape, groups: int, *, frame_count: FrameCount, placeholder_id: int
) -> SalmBatch:
    """A batch without a padded step: as many clips as fit, the rest of each row is text to score.

    For counting and compiling; its arrays take the memory of one group.
    """
    frames = frame_count(shape.samples) if shape.clips else 0
    clips = min(shape.clips // shape.rows, shape.tokens // max(frames, 1))
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
        [[example] * shape.rows],
        shape,
        frame_count=frame_count,
        placeholder_id=placeholder_id,
    )
    return one.map(lambda x: np.broadcast_to(x, (groups, *x.shape[1:])))


def _fill_group(
    arrays: dict[str, np.ndarray],
    examples: Sequence[SalmExample | None],
    shape: BatchShape,
    layout: Callable[[SalmExample], SequenceLayout],
    capacity: int,
    shift: bool,
) -> None:
    """Writes one group's rows and clips into its arrays, which are of the bucket's shape."""
    clips = [(e.id, clip) for e in examples if e is not None for clip in e.audio]
    if len(examples) > shape.rows or len(clips) > shape.clips:
        raise ValueError(f"{len(examples)} conversations with {len(clips)} clips exceed {shape}")
    for c, (name, clip) in enumerate(clips):
        if len(clip) > shape.samples:
            raise ValueError(f"{name!r}: a clip of {len(clip)} samples exceeds {shape}")
        arrays["audio"][c, : len(clip)] = clip
        arrays["audio_lengths"][c] = len(clip)
    first_clip = 0
    for r, example in enumerate(examples):
        if example is None:
            continue
        row = layout(example)
        n = max(len(row) - shift, 0)
        if n > shape.tokens:
            raise ValueError(f"{example.id!r}: {n} steps exceed {shape}")
        slot = (first_clip + row.clip) * capacity + row.frame
        arrays["tokens"][r, :n] = row.tokens[:n]
        arrays["audio_index"][r, :n] = np.where(row.clip >= 0, slot, -1)[:n]
        arrays["attention_mask"][r, :n] = True
        arrays["segments"][r, :n] = 1
        arrays["positions"][r, :n] = np.arange(n)
        if shift:
            arrays["loss_mask"][r, :n] = row.loss_mask[1:]
            arrays["targets"][r, :n] = np.where(row.loss_mask, row.tokens, 0)[1:]
        first_clip += len(example.audio)


def _empty_arrays(groups: int, shape: BatchShape) -> dict[str, np.ndarray]:
    rows = (groups, shape.rows, shape.tokens)
    ints = ("tokens", "segments", "positions", "targets")
    arrays: dict[str, np.ndarray] = {n: np.zeros(rows, np.int32) for n in ints}
    arrays |= {n: np.zeros(rows, bool) for n in ("attention_mask", "loss_mask")}
    arrays["audio_index"] = np.full(rows, -1, np.int32)
    # zeros take no memory until they are written: groups of other processes stay so
    arrays["audio"] = np.zeros((groups, shape.clips, shape.samples), np.float32)
    arrays["audio_lengths"] = np.zeros((groups, shape.clips), np.int32)
    return arrays
