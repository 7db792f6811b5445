"""Full-duplex batches: audio and text channels of user and agent, aligned frame by frame.

Letters beside those of the package: `A` samples of the agent's audio, at the codec's rate; `T`
frames. Token t of a text channel belongs to the frame that starts at t * frame duration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

import numpy as np

from speechlm2_jax.batches.shared import A, TimeOrder
from speechlm2_jax.pytrees import register_pytree

B = TypeVar("B")


@register_pytree
@dataclass(frozen=True, kw_only=True)
class DuplexBatch(Generic[A]):
    """One global batch for a duplex model. Arrays are NumPy on the host, JAX on the devices."""

    source_audio: A
    """Float32 [G, R, S]: user audio at the model's rate, zeros after each length."""
    source_lengths: A
    """Int32 [G, R]: samples; 0 for padding (no conversation)."""
    source_extent: A
    """Int32 [G]: samples of the group's longest user audio, to which NeMo pads (`nemo_exact`)."""
    target_audio: A
    """Float32 [G, R, A]: agent audio at the codec's rate, zeros after each length."""
    target_lengths: A
    """Int32 [G, R]: samples."""
    target_extent: A
    """Int32 [G]: samples of the group's longest agent audio."""
    target_tokens: A
    """Int32 [G, R, T]: text tokens of the agent; the pad id where there is none."""
    source_tokens: A
    """Int32 [G, R, T]: text tokens of the user; the pad id where there is none."""
    token_lengths: A
    """Int32 [G, R]: frames of both text channels."""
    token_extent: A
    """Int32 [G]: frames of the group's longest text channels."""
    sequence_ids: A
    """Int32 [G, R]: index of the conversation in the global batch; seeds its random draws."""

    def map(self, fn: Callable[[A], B]) -> "DuplexBatch[B]":
        """Applies `fn` to every array."""
        return DuplexBatch(**{f.name: fn(getattr(self, f.name)) for f in fields(self)})

    def in_time_order(self, time_order: TimeOrder) -> "DuplexBatch[A]":
        """Returns the batch as it is: `networks.duplex` aligns and reorders the channels."""
        return self


@dataclass(frozen=True, kw_only=True)
class DuplexExample:
    """One conversation: audio and text channels; also the reference in validation."""

    id: str
    source_audio: np.ndarray
    """Float32 [S]: user audio at the model's rate."""
    target_audio: np.ndarray
    """Float32 [A]: agent audio at the codec's rate."""
    target_tokens: np.ndarray
    """Int32 [T]: the agent's text channel."""
    source_tokens: np.ndarray
    """Int32 [T]: the user's text channel."""
    target_text: str = ""
    """The agent's whole text, also what its channel had no frames for."""
    source_text: str = ""
    """The user's whole text."""
    prompt_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Int32 [P]: the system prompt, of speech-to-text models only."""
    is_asr: bool = False
    """Whether it is ASR data, in which the agent's turns are not scored."""


@dataclass(frozen=True, kw_only=True)
class DuplexShape:
    """The static shape of one bucket: the sizes of one group."""

    sequences: int
    tokens: int
    """Frames T of a conversation: each has one text token."""
    source_samples: int
    target_samples: int
    prompt_tokens: int = 0
    """Room for a system prompt, of speech-to-text models only."""

    @property
    def clips(self) -> int:
        """Capacity of a group in user recordings: one per conversation."""
        return self.sequences

    @property
    def name(self) -> str:
        """Unique name of the shape; each shape is compiled once."""
        name = f"rows{self.sequences}_tokens{self.tokens}_source{self.source_samples}"
        if self.target_samples:
            name += f"_target{self.target_samples}"
        return f"{name}_prompt{self.prompt_tokens}" if self.prompt_tokens else name


def assemble_duplex_batch(
    groups: Sequence[Sequence[DuplexExample | None]], shape: DuplexShape, *, pad_id: int
) -> DuplexBatch[np.ndarray]:
    """Assembles a batch of one static shape, padded on the right.

    A group may have fewer conversations than the shape; what is missing, and None, is padding.
    Raises ValueError if a conversation does not fit.
    """
    G, R = len(groups), shape.sequences
    counts = ("source_lengths", "target_lengths", "token_lengths")
    arrays: dict[str, np.ndarray] = {name: np.zeros((G, R), np.int32) for name in counts}
    # np.zeros takes no memory until it is written: groups of other processes never are
    arrays["source_audio"] = np.zeros((G, R, shape.source_samples), np.float32)
    arrays["target_audio"] = np.zeros((G, R, shape.target_samples), np.float32)
    for name in ("target_tokens", "source_tokens"):
        arrays[name] = np.full((G, R, shape.tokens), pad_id, np.int32)
    for g, group in enumerate(groups):
        if len(group) > R:
            raise ValueError(f"{len(group)} conversations exceed {shape}")
        for r, example in enumerate(group):
            if example is not None:
                _fill_sequence(arrays, (g, r), example, shape)
    return DuplexBatch(
        source_extent=arrays["source_lengths"].max(axis=1, initial=0),
        target_extent=arrays["target_lengths"].max(axis=1, initial=0),
        token_extent=arrays["token_lengths"].max(axis=1, initial=0),
        sequence_ids=np.arange(G * R, dtype=np.int32).reshape(G, R),
        **arrays,
    )


def full_duplex_batch(
    shape: DuplexShape, groups: int, *, pad_id: int = 0
) -> DuplexBatch[np.ndarray]:
    """Makes a batch of silence and pad ids, without padding.

    For counting FLOPs and compiling. Its arrays take the memory of one group.
    """
    channel = np.full(shape.tokens, pad_id, np.int32)
    example = DuplexExample(
        id="full",
        source_audio=np.zeros(shape.source_samples, np.float32),
        target_audio=np.zeros(shape.target_samples, np.float32),
        target_tokens=channel,
        source_tokens=channel,
    )
    one = assemble_duplex_batch([[example] * shape.sequences], shape, pad_id=pad_id)
    return one.map(lambda x: np.broadcast_to(x, (groups, *x.shape[1:])))


_LENGTH_OF = {
    "source_audio": "source_lengths",
    "target_audio": "target_lengths",
    "target_tokens": "token_lengths",
    "source_tokens": "token_lengths",
}


def _fill_sequence(
    arrays: dict[str, np.ndarray],
    index: tuple[int, int],
    example: DuplexExample,
    shape: DuplexShape,
) -> None:
    for name, length in _LENGTH_OF.items():
        values = getattr(example, name)
        if len(values) > arrays[name].shape[-1]:
            raise ValueError(f"{example.id!r}: {name} of {len(values)} exceeds {shape}")
        arrays[name][index][: len(values)] = values
        arrays[length][index] = len(values)
