"""Conversations of two voices, laid out frame by frame: the user's channels and the agent's.

Letters beside those of the package: `A` samples of the agent's audio, at the codec's rate; `T`
frames. Frame t of a text channel is what is said from t * frame length on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from speechlm2_jax.batches.shared import TimeOrder


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DuplexBatch:
    """One global batch for a duplex model. Arrays are NumPy on the host, JAX on the device."""

    source_audio: Any
    """Float32 [G, R, S]: the user, at the model's rate, zeros after each length."""
    source_lengths: Any
    """Int32 [G, R] samples; 0 marks an empty row."""
    source_extent: Any
    """Int32 [G] samples of the group's longest: NeMo's padded length (`nemo_exact`)."""
    target_audio: Any
    """Float32 [G, R, A]: the agent, at the codec's rate, zeros after each length."""
    target_lengths: Any
    """Int32 [G, R] samples."""
    target_extent: Any
    """Int32 [G] samples of the group's longest."""
    target_tokens: Any
    """Int32 [G, R, T]: what the agent says, the pad id wherever no token is."""
    source_tokens: Any
    """Int32 [G, R, T]: what the user says, the pad id wherever no token is."""
    token_lengths: Any
    """Int32 [G, R] frames, of both text channels."""
    token_extent: Any
    """Int32 [G] frames of the group's longest."""
    row_ids: Any
    """Int32 [G, R]: the row's position in the global batch; random draws depend on it."""

    def map(self, fn: Callable[[Any], Any]) -> "DuplexBatch":
        """Applies `fn` to every array."""
        return DuplexBatch(**{f.name: fn(getattr(self, f.name)) for f in fields(self)})

    def laid_out(self, time_order: TimeOrder) -> "DuplexBatch":
        """The batch as it is: its channels are aligned, and then ordered, on the device."""
        return self


@dataclass(frozen=True, kw_only=True)
class DuplexExample:
    """One conversation, ready for the model; also what validation compares answers with."""

    id: str
    source_audio: np.ndarray
    """Float32 [S]: the user, at the model's rate."""
    target_audio: np.ndarray
    """Float32 [A]: the agent, at the codec's rate."""
    target_tokens: np.ndarray
    """Int32 [T]: the agent's text channel."""
    source_tokens: np.ndarray
    """Int32 [T]: the user's text channel."""
    target_text: str = ""
    """All that the agent says, also what found no room in its channel."""
    source_text: str = ""
    """All that the user says."""


@dataclass(frozen=True, kw_only=True)
class DuplexShape:
    """The static shape of one bucket, per group."""

    rows: int
    tokens: int
    """Frames T of a row."""
    source_samples: int
    target_samples: int

    @property
    def clips(self) -> int:
        """Conversations that a group has room for: one in each row."""
        return self.rows

    @property
    def name(self) -> str:
        """A name that says the whole shape: one compiled program each."""
        return (
            f"rows{self.rows}_tokens{self.tokens}_source{self.source_samples}"
            f"_target{self.target_samples}"
        )


def assemble_duplex_batch(
    groups: Sequence[Sequence[DuplexExample | None]], shape: DuplexShape, *, pad_id: int
) -> DuplexBatch:
    """Lays out groups of conversations in one static shape, padded on the right.

    None, and fewer conversations than the shape has rows, leave empty rows. Raises ValueError if a
    conversation does not fit.
    """
    G, R = len(groups), shape.rows
    counts = ("source_lengths", "target_lengths", "token_lengths")
    arrays: dict[str, np.ndarray] = {name: np.zeros((G, R), np.int32) for name in counts}
    # zeros take no memory until they are written: groups of other processes stay so
    arrays["source_audio"] = np.zeros((G, R, shape.source_samples), np.float32)
    arrays["target_audio"] = np.zeros((G, R, shape.target_samples), np.float32)
    for name in ("target_tokens", "source_tokens"):
        arrays[name] = np.full((G, R, shape.tokens), pad_id, np.int32)
    for g, group in enumerate(groups):
        if len(group) > R:
            raise ValueError(f"{len(group)} conversations exceed {shape}")
        for r, example in enumerate(group):
            if example is not None:
                _fill_row(arrays, (g, r), example, shape)
    return DuplexBatch(
        source_extent=arrays["source_lengths"].max(axis=1, initial=0),
        target_extent=arrays["target_lengths"].max(axis=1, initial=0),
        token_extent=arrays["token_lengths"].max(axis=1, initial=0),
        row_ids=np.arange(G * R, dtype=np.int32).reshape(G, R),
        **arrays,
    )


def full_duplex_batch(shape: DuplexShape, groups: int, *, pad_id: int = 0) -> DuplexBatch:
    """A batch without a padded frame, of silence and pad ids.

    For counting and compiling; its arrays take the memory of one group.
    """
    channel = np.full(shape.tokens, pad_id, np.int32)
    example = DuplexExample(
        id="full",
        source_audio=np.zeros(shape.source_samples, np.float32),
        target_audio=np.zeros(shape.target_samples, np.float32),
        target_tokens=channel,
        source_tokens=channel,
    )
    one = assemble_duplex_batch([[example] * shape.rows], shape, pad_id=pad_id)
    return one.map(lambda x: np.broadcast_to(x, (groups, *x.shape[1:])))


_LENGTH_OF = {
    "source_audio": "source_lengths",
    "target_audio": "target_lengths",
    "target_tokens": "token_lengths",
    "source_tokens": "token_lengths",
}


def _fill_row(
    arrays: dict[str, np.ndarray], row: tuple[int, int], example: DuplexExample, shape: DuplexShape
) -> None:
    for name, length in _LENGTH_OF.items():
        values = getattr(example, name)
        if len(values) > arrays[name].shape[-1]:
            raise ValueError(f"{example.id!r}: {name} of {len(values)} exceeds {shape}")
        arrays[name][row][: len(values)] = values
        arrays[length][row] = len(values)
